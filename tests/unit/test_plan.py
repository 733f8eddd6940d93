"""The search for a layout, and tools/plan_layout.py."""

import json
import math

import pytest

from megatron.config.command_line import parse
from megatron.parallel.layout import check_layout
from megatron.plan.gpus import GPUS
from megatron.plan.messages import step_traffic
from megatron.plan.rank import Rank
from megatron.plan.search import Machine, best_plans, layout_flags
from megatron.plan.step_time import compute_seconds, step_time
from tools import plan_layout
from tools.plan_layout import main

TP2, FULL = ["--tensor-model-parallel-size", "2"], ["--checkpoint-activations"]


@pytest.fixture(scope="module")
def plans():
    config, _ = parse(["--preset", "tape", "--global-batch-size", "256"])
    return best_plans(config, Machine("a100-40gb", 16, 8, 0.1), [])


def test_plans_fit_and_come_fastest_first(plans):
    assert len(plans) > 100
    assert [plan.time.step_s for plan in plans] == sorted(plan.time.step_s for plan in plans)
    assert max(plan.memory.peak for plan in plans) <= 36 * 2**30
    assert all(math.prod(plan.sizes.values()) == 16 and 0 < plan.time.mfu < 0.6 for plan in plans)


def test_the_flags_of_a_plan_ask_for_it(plans):
    for plan in plans[::40]:
        flags = " ".join(layout_flags(plan.config)).split()
        config, _ = parse(["--preset", "tape", *flags])
        check_layout(config, 16)
        assert config == plan.config


def test_flags_that_are_given_are_kept():
    config, _ = parse(["--preset", "tape", "--global-batch-size", "256", *TP2, *FULL])
    plans = best_plans(config, Machine("a100-40gb", 16, 8, 0.1), ["--tensor-model-parallel-size", *FULL])
    assert {(plan.sizes["tensor"], plan.config.model.checkpoint_activations) for plan in plans} == {(2, True)}


@pytest.mark.parametrize("flags", [["--data-parallel-sharding", "optimizer"], ["--DDP-impl", "torch"]])
def test_a_sharding_that_is_given_is_kept_where_there_is_nobody_to_share_with(flags):
    config, _ = parse(["--preset", "demo", "--global-batch-size", "64", *flags])
    assert best_plans(config, Machine("h100-80gb", 1, 8, 0.1), flags)


def test_tensor_groups_that_straddle_two_hosts_send_over_the_network():
    config, _ = parse(["--preset", "tape", "--num-attention-heads", "12", "--hidden-size", "768", "--global-batch-size",
                       "64", "--micro-batch-size", "1", "--tensor-model-parallel-size", "3"])

    def step_s(num_ranks, gpus_per_node):
        rank = Rank(config, num_ranks)
        return step_time([rank], [step_traffic(rank)], GPUS["h100-80gb"], gpus_per_node).step_s

    assert step_s(24, 8) > step_s(24, 6) and step_s(3, 8) == step_s(3, 3)


@pytest.mark.table
def test_context_is_split_where_nothing_fits_without():
    config, _ = parse(["--preset", "tape", "--seq-length", "262144", "--max-position-embeddings", "262144",
                       "--global-batch-size", "16", *TP2])
    machine, given = Machine("a100-40gb", 16, 8, 0.9), ["--tensor-model-parallel-size"]
    assert min(plan.sizes["context"] for plan in best_plans(config, machine, given)) > 1


def seconds(*flags, gpu="h100-80gb"):
    """Of the passes of four rows of ESM-2 of 3B parameters."""
    config, _ = parse(["--preset", "esm2-3b", "--micro-batch-size", "4", "--global-batch-size", "32", *flags],
                      {"lr": 1e-4, "train_iters": 1})
    return compute_seconds(Rank(config, 8), GPUS[gpu])


def test_products_take_the_time_of_their_precision():
    fp32, tf32, bf16 = (seconds(*flags) for flags in (["--no-bf16"], ["--no-bf16", "--tf32"], ["--bf16"]))
    assert fp32 > 3 * tf32 and tf32 > 1.5 * bf16
    assert 0.6 * bf16 < seconds("--bf16", "--fp8", "hybrid") < 0.85 * bf16


def test_auto_precision_is_planned_as_bf16():
    config, _ = parse(["--preset", "tape", "--global-batch-size", "32", "--no-bf16", "--no-fp16", "--precision", "auto",
                       *TP2, "--micro-batch-size", "2"])
    given = ["--tensor-model-parallel-size", "--micro-batch-size", "--pipeline-schedule"]
    assert {plan.config.precision.bf16 for plan in best_plans(config, Machine("a100-40gb", 2, 8, 0.1), given)} == {True}


BOUGHT = ["--preset", "proteinlm-200m", "--gpus", "8", "--global-batch-size", "64", *TP2]


def test_the_tool_prints_a_table_and_flags_to_paste(capsys):
    assert main([*BOUGHT, "--gpu", "h100-80gb", "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= 140
    assert len([line for line in lines if line.startswith("  2 ")]) == 3
    assert "--tensor-model-parallel-size 2" in lines[-1]


def test_the_tool_keeps_what_a_file_says_of_the_layout_and_tries_the_rest(capsys, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('preset = "proteinlm-200m"\ntensor-model-parallel-size = 2\npipeline-model-parallel-size = 1\n')
    asked = ["--gpus", "8", "--global-batch-size", "64", "--gpu", "h100-80gb", "--top", "2", "--json"]
    assert main([*asked, "--config", str(file)]) == 0
    by_file = capsys.readouterr().out
    assert main([*asked, "--preset", "proteinlm-200m", *TP2]) == 0
    assert by_file == capsys.readouterr().out


def test_the_tool_plans_the_model_of_the_checkpoint_that_is_loaded(capsys, monkeypatch):
    saved = parse(["--preset", "proteinlm-200m"])[0].as_dict()
    monkeypatch.setattr(plan_layout, "saved_flags", {"there": saved}.__getitem__)
    asked = ["--gpus", "2", "--global-batch-size", "64", "--gpu", "h100-80gb", "--seq-length", "1024", "--bf16",
             "--micro-batch-size", "2", "--top", "2", "--json", *TP2, *FULL]
    assert main([*asked, "--load", "there"]) == 0
    by_checkpoint = capsys.readouterr().out
    assert main([*asked, "--preset", "proteinlm-200m"]) == 0
    assert by_checkpoint == capsys.readouterr().out


def test_the_tool_prints_json(capsys):
    assert main([*BOUGHT, "--gpu", "h100-80gb", "--top", "2", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["step_s"] <= second["step_s"]
    assert first["peak_bytes"] == sum(first[f"{kind}_bytes"] for kind in (
        "parameter", "gradient", "optimizer", "activation"))


@pytest.mark.parametrize(("flags", "message"), [
    (["--gpu", "h100"], f"--gpu h100 is not known; give one of {', '.join(GPUS)}"),
    (["--gpu", "v100-32gb"], "--gpu v100-32gb is from before compute capability 8.0"),
    (["--gpu", "a100-40gb", "--no-fp16", "--bf16", "--fp8", "hybrid"],
     "--fp8-recipe tensorwise needs compute capability 8.9, and --gpu a100-40gb has 8.0"),
    (["--gpu", "h200-141gb", "--no-fp16", "--bf16", "--fp8", "e4m3", "--fp8-recipe", "mxfp8"],
     "--fp8-recipe mxfp8 needs compute capability 10.0, and --gpu h200-141gb has 9.0"),
    (["--gpu", "a100-40gb", "--num-layers", "600", "--gpus", "2"], "nothing fits: the least that a layout of 2 GPUs"),
    (["--gpu", "a100-40gb", "--num-layers", "600", "--gpus", "1", "--tensor-model-parallel-size", "1",
      "--no-sequence-parallel"], "a layout of 1 GPU holds"),
    (["--gpu", "a100-40gb", "--global-batch-size", "3", "--pipeline-model-parallel-size", "1",
      "--context-parallel-size", "1"],
     "no layout of 8 GPUs divides --global-batch-size 3"),
    (["--gpu", "a100-40gb", "--num-layrs", "2"], "did you mean --num-layers?"),
])
def test_the_tool_refuses_in_one_line(capsys, flags, message):
    assert main([*BOUGHT, *flags]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert message in output.err
