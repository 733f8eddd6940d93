"""Layers that multiply in FP8 on two ranks agree with one rank, and gather half as many bytes."""

from unittest.mock import patch

import pytest
import torch

from megatron.kernels.fp8 import E4M3, E5M2, Delay, Recipe, Scaling, dequantised, largest, quantised
from megatron.kernels.pointwise.product import whole
from megatron.parallel.mesh import Mesh
from megatron.parallel.parameters import Normal
from megatron.parallel.placement import Placement
from megatron.parallel.tensor import layers
from megatron.parallel.tensor.amax_history import AmaxHistory
from megatron.parallel.tensor.layers import ColumnParallelLinear, RowParallelLinear
from megatron.parallel.tensor.stream import ONE_RANK_STREAM, Stream
from megatron.parallel.traffic import TrafficCounter
from tests.ranks.launch import run_ranks
from tests.ranks.test_split_modules import fill, gradients
from tests.wholes import assembled

TOKENS, WIDTH = 128, 64  # of which a rank has two blocks of MXFP8
KINDS = ("column", "row", "row apart")  # without its bias, which is added behind, as a GPU's kernels do
SCALINGS: tuple[Scaling, ...] = ("tensorwise", "rowwise", "mxfp8")
RECIPES: dict[str, Recipe | None] = {"bf16": None, **{scaling: Recipe(scaling, E5M2) for scaling in SCALINGS},
                                     "delayed": Recipe("tensorwise", E5M2, Delay(4, True, 0))}


def values(seed):
    """[t, o], bf16; the second half of the tokens 16 times as large, so that ranks have other largest magnitudes.

    Under any scale that they may share none is subnormal: whatever shares one, the same numbers come out.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.empty(TOKENS, WIDTH).uniform_(0.25, 2.0, generator=generator)
    signs = torch.randint(0, 2, (TOKENS, WIDTH), generator=generator) * 2 - 1
    return (sizes * signs * torch.where(torch.arange(TOKENS) < TOKENS // 2, 1 / 16, 1.0)[:, None]).bfloat16()


def outcome(kind, stream, recipe, counter):
    """Output, input gradient and parameters' gradients of a layer, as wholes; the bytes this rank sent; its history.

    Where scales are delayed, a step like this one went before.
    """
    on_stream = Placement(stream.axis, 0, TOKENS) if stream.is_split else Placement()
    on_features = Placement(stream.axis, 1, WIDTH)
    layer = (ColumnParallelLinear if kind == "column" else RowParallelLinear)(WIDTH, WIDTH, stream, Normal(1.0))
    before, after = (on_stream, on_features) if kind == "column" else (on_features, on_stream)
    layer.recipe = recipe
    fill(layer)
    history = AmaxHistory([torch.nn.ModuleList([layer])], Mesh(tensor=stream.axis))
    shape = [size // (stream.axis.size if before.dim == dim else 1) for dim, size in enumerate((TOKENS, WIDTH))]
    x = before.cut(values(1), torch.empty(shape)).clone().requires_grad_()

    def passed():
        with patch.object(layers, "takes_triton", lambda _: kind == "row apart"):
            y = whole(layer.product(x)) if kind == "row apart" else layer(x)
            y.backward(after.cut(values(2), y))
        return y

    if recipe is not None and recipe.delay:
        with history.of_step():
            passed()
        layer.zero_grad()
        x.grad = None
    with counter:
        y = passed()
    sent = dict(counter.traffic.sent) if counter.traffic.sent else {}
    whole_tensors = assembled({"output": after.part(y), "input gradient": before.part(x.grad)})
    return {**whole_tensors, **gradients(layer)}, sent, history.state()


def outcomes(axis):
    """For each recipe, kind of layer and whether tokens are split: this layout's outcome, its twin's, and bytes."""
    mesh = Mesh(tensor=axis)
    found = {}
    for name, recipe in RECIPES.items():
        for kind in KINDS:
            for is_split in (False, True):
                ours, sent, history = outcome(kind, Stream(axis, is_split), recipe, TrafficCounter(mesh))
                twin, _, _ = outcome(kind, ONE_RANK_STREAM, recipe, TrafficCounter(mesh))
                found[name, kind, is_split] = ours, twin, {operation: size for (_, operation), size in sent.items()}
                found["history", kind, is_split] = history  # of the last recipe, delayed
    return found | {("history", "replicas"): history_of_replicas(axis)}


def history_of_replicas(axis):
    """Of a whole layer, of which each rank sees its half of the tokens."""
    layer = ColumnParallelLinear(WIDTH, WIDTH, ONE_RANK_STREAM, Normal(1.0))
    layer.recipe = RECIPES["delayed"]
    fill(layer)
    history = AmaxHistory([torch.nn.ModuleList([layer])], Mesh(replicas=axis))
    with history.of_step():
        layer(values(1).chunk(2)[axis.rank]).sum().backward()
    return history.state()


def history_of_a_pipeline(axis):
    """Of a stage with a layer, and one without."""
    layers = [ColumnParallelLinear(WIDTH, WIDTH, ONE_RANK_STREAM, Normal(1.0))][:1 - axis.rank]
    for layer in layers:
        layer.recipe = RECIPES["delayed"]
    return AmaxHistory([torch.nn.ModuleList(layers)], Mesh(pipeline=axis)).state()


def test_a_stage_without_blocks_takes_part_in_what_a_checkpoint_keeps():
    first, second = run_ranks(history_of_a_pipeline, 2)
    assert first == second and len(first) == 1


@pytest.fixture(scope="module")
def found():
    return run_ranks(outcomes, 2)


@pytest.mark.parametrize("scaling", [*SCALINGS, "delayed"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_split", [False, True])
def test_two_ranks_have_the_numbers_of_one(found, scaling, kind, is_split):
    for ours, twin, _ in (rank[scaling, kind, is_split] for rank in found):
        assert ours.keys() == twin.keys()
        for name, expected in twin.items():
            # A sum over the ranks is of two numbers in bf16.
            is_summed = name == ("input gradient" if kind == "column" else "output")
            of_apart = 2.0**-8 if (kind, name) == ("row apart", "bias") else 1e-6
            error = (ours[name].double() - expected.double()).norm() / expected.double().norm()
            assert error <= (2.0**-8 if is_summed else of_apart), (name, error)


@pytest.mark.parametrize(("scaling", "kind", "gathers"), [
    # Of a column layer the input, in both passes; of a row layer the gradient.
    ("bf16", "column", 2 * 2), ("bf16", "row", 2), ("tensorwise", "column", 2 * 1), ("tensorwise", "row", 1),
    ("delayed", "column", 2 * 1), ("delayed", "row", 1),
    ("rowwise", "column", 2 * 1 + 4 / WIDTH), ("rowwise", "row", 2),
    ("mxfp8", "column", 2 * (1 + 1 / 32)), ("mxfp8", "row", 2)])
def test_sequence_parallel_gathers_are_half_as_large_in_fp8(found, scaling, kind, gathers):
    """`gathers`: bytes a number, with their scales; a rank of two sends half of the whole."""
    for rank in found:
        assert rank[scaling, kind, True][2]["all-gather"] == gathers * TOKENS * WIDTH / 2


@pytest.mark.parametrize("kind", ["column", "row"])
def test_ranks_agree_on_a_scale_before_they_gather_where_it_is_not_delayed(found, kind):
    for rank in found:
        assert rank["tensorwise", kind, True][2]["all-reduce"] == 4
        assert "all-reduce" not in rank["delayed", kind, True][2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_split", [False, True])
def test_two_ranks_remember_the_magnitudes_of_the_whole_tensors(found, kind, is_split):
    whole = [[values(seed).abs().max().item(), 0.0, 0.0, 0.0] for seed in (1, 2)]
    for rank in found:
        assert rank["history", kind, is_split] == {"0": whole}


def test_ranks_with_other_tokens_remember_the_largest_of_all(found):
    halves = values(1).chunk(2)
    largest_of_all = max(half.abs().max().item() for half in halves)
    assert halves[0].abs().max().item() < largest_of_all
    for rank in found:
        assert rank["history", "replicas"]["0"][0][0] == largest_of_all


def test_numbers_differ_where_ranks_do_not_agree_on_the_scale():
    x = values(1)
    whole = quantised(x, largest(x, "tensorwise", 1), "tensorwise", E4M3)
    halves = [quantised(half, largest(half, "tensorwise", 1), "tensorwise", E4M3) for half in x.chunk(2)]
    assert halves[0].scale.item() != whole.scale.item() == halves[1].scale.item()
    assert not torch.equal(halves[0].values.float(), whole.values[:TOKENS // 2].float())
    assert torch.equal(dequantised(halves[0]), dequantised(whole)[:TOKENS // 2])
