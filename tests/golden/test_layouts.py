"""Short real runs of pretrain_tape.py on several ranks that split the layers agree in every layout.

Most layouts are marked `table`; tests/ranks/test_model_layouts.py tries one step of those on two ranks in every run of
the tests.
"""

import pytest
import torch

from megatron.checkpoint.store import find
from megatron.log import Log
from megatron.parallel.mesh import Axis
from pretrain_tape import main
from tests.golden.training import DROPOUT, TINY, losses, run_on_ranks, run_program
from tests.tables import tried

MODEL = [*TINY, *DROPOUT, *"--num-layers 4 --num-attention-heads 4 --micro-batch-size 1 --global-batch-size 4 "
         "--eval-interval 2 --eval-iters 1".split()]
TP2 = ["--tensor-model-parallel-size", "2"]
TP4 = ["--tensor-model-parallel-size", "4"]
PP2 = ["--pipeline-model-parallel-size", "2"]
PP4 = ["--pipeline-model-parallel-size", "4"]
CP2 = ["--context-parallel-size", "2"]
SEQUENCE = ["--sequence-parallel"]
INTERLEAVED = ["--num-layers-per-virtual-pipeline-stage", "1"]
ZERO_BUBBLE = ["--pipeline-schedule", "zero-bubble"]
OVERLAPPED = ["--DDP-impl", "torch"]
FULL = ["--checkpoint-activations"]
SELECTIVE = ["--recompute-granularity", "selective"]


def sharding(what):
    return ["--data-parallel-sharding", what]


LAYOUTS = {
    "dp2": (2, []), "dp2-overlapped": (2, OVERLAPPED), "dp2-optimizer": (2, ["--use-distributed-optimizer"]),
    "dp2-gradients": (2, sharding("gradients")), "dp2-parameters": (2, sharding("parameters")),
    "dp4-parameters-within-2": (4, [*sharding("parameters"), "--shard-within", "2"]),
    "tp2": (2, TP2), "tp2-sequence": (2, [*TP2, *SEQUENCE]), "tp4": (4, TP4),
    "pp2": (2, PP2), "pp2-interleaved": (2, [*PP2, *INTERLEAVED]), "pp2-zero-bubble": (2, [*PP2, *ZERO_BUBBLE]),
    "pp2-uneven": (2, [*PP2, "--decoder-first-pipeline-num-layers", "0"]), "pp4": (4, PP4),
    "cp2": (2, CP2), "dp2-tp2": (4, TP2), "dp2-pp2": (4, PP2), "dp2-pp2-overlapped": (4, [*PP2, *OVERLAPPED]),
    "dp2-pp2-parameters": (4, [*PP2, *sharding("parameters")]), "tp2-pp2": (4, [*TP2, *PP2, *SEQUENCE]),
    "tp2-pp2-zero-bubble": (4, [*TP2, *PP2, *SEQUENCE, *ZERO_BUBBLE]),
    "dp2-tp2-sequence-optimizer": (4, [*TP2, *SEQUENCE, *sharding("optimizer")]),
    "cp2-tp2-sequence": (4, [*CP2, *TP2, *SEQUENCE]), "cp2-pp2-interleaved": (4, [*CP2, *PP2, *INTERLEAVED]),
    "cp2-dp2-gradients": (4, [*CP2, *sharding("gradients")]),
}


EACH_TIME = {"pp2-uneven", "dp4-parameters-within-2", "tp2-pp2-zero-bubble", "dp2-tp2-sequence-optimizer",
             "cp2-pp2-interleaved"}


def train(corpus, folder, ranks, *flags, num_steps=4):
    places = ["--data-path", corpus, "--save", str(folder), "--load", str(folder), "--train-iters", str(num_steps)]
    if ranks == 1:
        assert main([*MODEL, *places, *flags]) == 0
    else:
        assert run_on_ranks(*MODEL, *places, *flags, ranks=ranks) == [0] * ranks
    return curves(folder)


def curves(folder):
    """Loss and gradient norm of each step, and the losses of the evaluations."""
    return {"loss": losses(folder), "gradient norm": losses(folder, name="grad_norm"),
            "validation loss": losses(folder, "valid"), "accuracy": losses(folder, "valid", "masked_accuracy")}


def assert_close(ours, expected, tolerance=1e-5):
    for name, curve in expected.items():
        assert ours[name].keys() == curve.keys()
        worst = max(abs(ours[name][step] - curve[step]) / curve[step] for step in curve)
        assert worst < tolerance, f"{name}: off by {worst}"


def saved(folder, name="model"):
    """The tensors of a run's last checkpoint."""
    checkpoint = find(str(folder), Axis(), Log())
    return {key: tensor.read() for key, tensor in getattr(checkpoint, name).items()}


def assert_same_checkpoint(folder, expected_folder):
    for kind in ("model", "optimizer"):
        ours, expected = saved(folder, kind), saved(expected_folder, kind)
        assert {name: tensor.shape for name, tensor in ours.items()} == {
            name: tensor.shape for name, tensor in expected.items()}
        for name, tensor in expected.items():
            if kind == "model":
                torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-4, msg=name)
            elif not name.endswith("query_key_value.bias"):  # keys' biases change nothing: their gradients are noise
                assert (ours[name] - tensor).norm() <= 1e-3 * tensor.norm(), name


@pytest.fixture(scope="module")
def one_folder(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    train(corpus, folder, 1)
    return folder


@pytest.fixture(scope="module")
def one_rank(one_folder):
    return curves(one_folder)


@pytest.mark.parametrize("layout", tried(LAYOUTS, EACH_TIME))
def test_every_layout_follows_the_curve_of_one_rank_with_its_dropout(corpus, tmp_path, one_folder, layout):
    ranks, flags = LAYOUTS[layout]
    assert_close(train(corpus, tmp_path, ranks, *flags), curves(one_folder))
    assert_same_checkpoint(tmp_path, one_folder)


def test_shared_out_activations_follow_the_curve_of_one_rank(corpus, tmp_path, one_rank):
    flags = [*TP2, *FULL, "--distribute-checkpointed-activations"]
    assert_close(train(corpus, tmp_path, 2, *flags), one_rank)


def test_torchs_older_launcher_starts_ranks_that_share_the_model(corpus, tmp_path, one_rank, python):
    status, output = run_program(python, *MODEL, *TP2, "--train-iters", 4, "--data-path", corpus, "--save", tmp_path,
                                 ranks=2, launcher="launch")
    assert status == 0, output
    assert_close(curves(tmp_path), one_rank)


@pytest.mark.parametrize("layout", tried(
    ["pp2-zero-bubble", "dp2-parameters", "tp2-pp2-zero-bubble", "dp2-tp2-sequence-optimizer", "cp2-pp2-interleaved"],
    ["pp2-zero-bubble"]))
def test_runs_are_bitwise_equal_whatever_is_recomputed(corpus, tmp_path, layout):
    ranks, flags = LAYOUTS[layout]
    runs = {"first": [], "full": FULL, "selective": SELECTIVE}
    outcomes = {}
    for run, more in runs.items():
        curve = train(corpus, tmp_path / run, ranks, *flags, *more, num_steps=3)
        outcomes[run] = curve, {name: tensor.tolist() for name, tensor in saved(tmp_path / run).items()}
    assert all(outcome == outcomes["first"] for outcome in outcomes.values())


def test_zero_bubble_changes_no_bit(corpus, tmp_path):
    plain, put_off = (train(corpus, tmp_path / str(len(flags)), 2, *PP2, *flags, num_steps=4)
                      for flags in ([], ZERO_BUBBLE))
    assert plain == put_off


def test_a_run_goes_on_in_any_layout(corpus, tmp_path, one_folder):
    folder = tmp_path / "run"
    train(corpus, folder, 2, *TP2, "--exit-interval", "1")
    train(corpus, folder, 4, *LAYOUTS["cp2-pp2-interleaved"][1], "--exit-interval", "2")
    train(corpus, folder, 1, "--exit-interval", "3")
    assert_close(train(corpus, folder, 4, *LAYOUTS["dp2-pp2-parameters"][1]), curves(one_folder))
    assert_same_checkpoint(folder, one_folder)


@pytest.mark.parametrize("layout", tried(["tp2", "pp2", "cp2"], ["pp2"]))
def test_ranks_agree_on_the_step_after_which_time_is_up(corpus, tmp_path, layout):
    curve = train(corpus, tmp_path, 2, *LAYOUTS[layout][1], "--exit-duration-in-mins", "0.05", num_steps=10**6)["loss"]
    assert int((tmp_path / "latest_checkpointed_iteration.txt").read_text()) == len(curve) < 10**6


@pytest.mark.parametrize(("layout", "precision"), tried(
    [("tp2-sequence", "--bf16"), ("tp2-sequence", "--fp16"), ("pp2-zero-bubble", "--bf16"),
     ("dp2-pp2-parameters", "--fp16")], [("tp2-sequence", "--bf16"), ("dp2-pp2-parameters", "--fp16")]))
def test_half_precision_learns_like_fp32(corpus, tmp_path, one_rank, layout, precision):
    ranks, flags = LAYOUTS[layout]
    scale = ["--loss-scale", "1024"] if precision == "--fp16" else []
    half = train(corpus, tmp_path, ranks, *flags, precision, *scale)
    assert_close({"loss": half["loss"]}, {"loss": one_rank["loss"]}, 5e-3)
