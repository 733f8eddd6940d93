"""Short real runs of pretrain_tape.py on several ranks that share the layers: one run, any layout."""

import pytest
import torch
from safetensors.torch import load_file

from pretrain_tape import main
from tests.golden.training import DROPOUT, TINY, losses, run_on_ranks, run_program

MODEL = [*TINY, *"--num-layers 4 --num-attention-heads 4 --micro-batch-size 1 --global-batch-size 4".split()]
TP2 = ["--tensor-model-parallel-size", "2"]
TP4 = ["--tensor-model-parallel-size", "4"]
PP2 = ["--pipeline-model-parallel-size", "2"]
PP4 = ["--pipeline-model-parallel-size", "4"]
CP2 = ["--context-parallel-size", "2"]
SEQUENCE = ["--sequence-parallel"]
INTERLEAVED = ["--num-layers-per-virtual-pipeline-stage", "1"]
ZERO_BUBBLE = ["--pipeline-schedule", "zero-bubble"]
OVERLAPPED = ["--DDP-impl", "torch"]
RECOMPUTE = ["--checkpoint-activations"]


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


def train(corpus, folder, ranks, *flags, num_steps=8):
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


@pytest.fixture(scope="module")
def one_rank(corpus, tmp_path_factory):
    return train(corpus, tmp_path_factory.mktemp("one"), 1)


@pytest.mark.parametrize("recompute", [[], RECOMPUTE], ids=["", "recompute"])
@pytest.mark.parametrize(("ranks", "flags"), LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_follows_the_curve_of_one_rank(corpus, tmp_path, one_rank, ranks, flags, recompute):
    assert_close(train(corpus, tmp_path, ranks, *flags, *recompute), one_rank)


def test_shared_out_activations_follow_the_curve_of_one_rank(corpus, tmp_path, one_rank):
    flags = [*TP2, *RECOMPUTE, "--distribute-checkpointed-activations"]
    assert_close(train(corpus, tmp_path, 2, *flags), one_rank)


def test_the_launcher_starts_tensor_parallel_ranks(corpus, tmp_path, one_rank):
    status, output = run_program(*MODEL, *TP2, *SEQUENCE, "--train-iters", 8, "--data-path", corpus, "--save",
                                 tmp_path, ranks=2)
    assert status == 0, output
    assert_close(curves(tmp_path), one_rank)


@pytest.mark.parametrize(("ranks", "flags"), [(2, TP2), (4, [*TP2, *SEQUENCE])], ids=["tp2", "dp2-tp2-sequence"])
def test_with_dropout_reruns_and_recomputation_are_bitwise_equal(corpus, tmp_path, ranks, flags):
    flags = [*flags, *DROPOUT]
    first = train(corpus, tmp_path / "first", ranks, *flags)
    assert train(corpus, tmp_path / "again", ranks, *flags) == first
    assert train(corpus, tmp_path / "recomputed", ranks, *flags, *RECOMPUTE) == first


def test_a_run_goes_on_in_any_layout(corpus, tmp_path, one_rank):
    folder = tmp_path / "run"
    train(corpus, folder, 2, *TP2, "--exit-interval", "2")
    train(corpus, folder, 1, "--exit-interval", "4")
    train(corpus, folder, 4, *TP4, *SEQUENCE, "--exit-interval", "6")
    assert_close(train(corpus, folder, 4, *TP2), one_rank)


def test_a_checkpoint_holds_the_same_tensors_whatever_the_layout(corpus, tmp_path):
    train(corpus, tmp_path / "one", 1, num_steps=2)
    train(corpus, tmp_path / "four", 4, *TP4, num_steps=2)
    for name in ("model", "optimizer"):
        one, four = (load_file(tmp_path / run / "iter_0000002" / f"{name}.safetensors") for run in ("one", "four"))
        assert one.keys() == four.keys()
        for key, tensor in one.items():
            if name == "model":
                torch.testing.assert_close(four[key], tensor, rtol=0, atol=1e-4, msg=key)
            else:
                assert four[key].shape == tensor.shape, key


def test_tensor_ranks_agree_on_the_step_after_which_time_is_up(corpus, tmp_path):
    curve = train(corpus, tmp_path, 2, *TP2, "--exit-duration-in-mins", "0.02", num_steps=10**6)["loss"]
    assert int((tmp_path / "latest_checkpointed_iteration.txt").read_text()) == len(curve) < 10**6


@pytest.mark.parametrize("precision", ["--bf16", "--fp16"])
def test_half_precision_learns_like_fp32(corpus, tmp_path, one_rank, precision):
    half = train(corpus, tmp_path, 2, *TP2, *SEQUENCE, precision, "--loss-scale", "1024")
    assert_close({"loss": half["loss"]}, {"loss": one_rank["loss"]}, 5e-3)
