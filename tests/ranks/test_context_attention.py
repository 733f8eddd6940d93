"""Attention over tokens that are split over the context axis equals that of one rank."""

from unittest.mock import patch

import pytest
import torch

from megatron.kernels.attention import native
from megatron.kernels.attention.by_protein import tiles_of
from megatron.kernels.attention.packed import packed_attention
from megatron.kernels.dropout import Dropout, Use
from megatron.kernels.packed_sequence import protein_lengths
from megatron.parallel.collectives import gather_slices
from megatron.parallel.context import context_attention
from megatron.parallel.mesh import Axis
from tests.packed import fused_by_definition, packed_batch
from tests.ranks.launch import run_ranks

HEADS, WIDTH = 2, 8
# Lengths of proteins and tokens of filler, by what is special about how 2 and 4 ranks share them.
CASES = {
    "proteins across ranks": ((5, 9, 2, 8), 0),
    "proteins across ranks and filler": ((5, 9, 2, 7), 5),
    "one protein on all ranks": ((24,), 0),
    "ranks with filler alone": ((3, 2), 19),
    "proteins of one token": ((1,) * 8, 0),
    "filler alone": ((), 8),
}
RATES = 0.0, 0.3
# Relative to the norm of the tensor.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}


def sequence(case):
    lengths, filler = CASES[case]
    return packed_batch(*lengths, filler=filler, empty=2).sequence


def normal(*shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attended(qkv, *arguments):
    """Of the projection as one tensor."""
    return context_attention((qkv,), *arguments)


def fused(qkv, sequence, dropout, axis):
    """What GPUs take: torch's operator in bf16, Triton's kernels in fp32."""
    with fused_by_definition() as calls:
        context_tnd = attended(qkv, sequence, dropout, axis)
    assert [name for name, _ in calls] == ["triton" if qkv.dtype == torch.float32 or dropout else "varlen"]
    return context_tnd


def by_protein(*arguments):
    """What CPUs take without the C++ helper."""
    with patch.object(native, "INSTRUCTION_SETS", ()):
        return attended(*arguments)


WAYS = {"by protein": by_protein, "fused": fused}
if native.INSTRUCTION_SETS:
    WAYS["compiled"] = attended


def dropout(rate):
    return Dropout(rate, torch.tensor(7), Use.PROBABILITIES) if rate else None


def slices(case, dtype, axis):
    """This rank's tokens of queries, keys and values, and of the gradient of their context, 0 for the filler."""
    lengths, filler = CASES[case]
    total = sum(lengths) + filler
    mine = slice(axis.rank * total // axis.size, (axis.rank + 1) * total // axis.size)
    weights = normal(total, HEADS, WIDTH, dtype=dtype, seed=1)
    weights[sum(lengths):] = 0
    return normal(total, HEADS, 3, WIDTH, dtype=dtype, seed=0)[mine].requires_grad_(), weights[mine]


def context_and_gradient(attend, case, dtype, rate, axis):
    qkv, weights = slices(case, dtype, axis)
    context_tnd = attend(qkv, sequence(case), dropout(rate), axis)
    return [context_tnd.detach(), *torch.autograd.grad(context_tnd, qkv, weights)]


def with_dropout(attend, axis):
    """Context times the gradient to it, and values times theirs; how many elements are kept, and of which kinds."""
    packed, kept = sequence("proteins across ranks and filler"), []
    qkv, weights = slices("proteins across ranks and filler", torch.float32, axis)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        context_tnd = attend(qkv, packed, dropout(0.3), axis)
    gradient, = torch.autograd.grad(context_tnd, qkv, weights)
    lengths = protein_lengths(packed.cu_seqlens, packed.num_filler)
    tiles = tiles_of(lengths, axis.rank * len(qkv), (axis.rank + 1) * len(qkv))
    num_scores = sum(HEADS * tile.num_queries * tile.num_keys for tile in tiles)
    return {"products": [(context_tnd * weights).sum().item(), (qkv * gradient)[:, :, 2].sum().item()],
            "kept": sum(kept), "own": qkv.numel() + context_tnd.numel(), "scores": num_scores,
            "statistics": 2 * len(qkv) * HEADS}


def gathered(axis):
    """The whole of tokens 1, 2 times the rank's number from 1, and the gradient for output gradients likewise."""
    tokens = ((axis.rank + 1) * torch.arange(1., 3.)).requires_grad_()
    whole = gather_slices(tokens, axis)
    gradient, = torch.autograd.grad(whole, tokens, (axis.rank + 1) * torch.arange(1., 1 + len(whole)))
    return [whole.tolist(), gradient.tolist()]


def on_one_rank_of_many(axis):
    """All that the tests below ask about, in one launch of the ranks."""
    contexts = {(case, way, dtype, rate): context_and_gradient(WAYS[way], case, dtype, rate, axis)
                for case in CASES for way in WAYS for dtype in TOLERANCE for rate in RATES}
    dropped = {way: with_dropout(WAYS[way], axis) for way in WAYS if way != "fused"}
    return {"contexts": contexts, "with dropout": dropped, "gathered": gathered(axis)}


@pytest.fixture(scope="module", params=[2, 4])
def results(request):
    return run_ranks(on_one_rank_of_many, request.param)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rate", RATES)
def test_context_and_gradient_are_those_of_one_rank(results, case, way, dtype, rate):
    expected = context_and_gradient(attended, case, dtype, rate, Axis())
    contexts, gradients = zip(*(rank["contexts"][case, way, dtype, rate] for rank in results), strict=True)
    num_real = sum(CASES[case][0])  # what the filler's contexts are is nobody's business
    for split, whole in ((torch.cat(contexts)[:num_real], expected[0][:num_real]), (torch.cat(gradients), expected[1])):
        assert split.shape == whole.shape
        assert (split - whole).float().norm() <= TOLERANCE[dtype] * whole.float().norm()


@pytest.mark.parametrize("way", [way for way in WAYS if way != "fused"])
def test_the_gradient_has_the_dropout_of_the_context(results, way):
    """The context is linear in the values, so both sums are the same."""
    products = torch.tensor([rank["with dropout"][way]["products"] for rank in results])
    by_context, by_gradient = products.sum(0).tolist()
    assert by_gradient == pytest.approx(by_context, rel=1e-5)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "fused"])
def test_other_ranks_keys_and_values_are_not_kept_for_the_backward_pass(results, way):
    for rank in results:
        numbers = rank["with dropout"][way]
        others = {"by protein": 2 * numbers["scores"],  # probabilities and what dropout keeps of them
                  "compiled": numbers["statistics"]}
        assert numbers["kept"] == numbers["own"] + others[way]


def test_gathered_slices_are_whole_and_their_gradients_are_summed(results):
    numbers = range(1, len(results) + 1)
    whole = [number * token for number in numbers for token in (1, 2)]
    gradients = [[sum(numbers) * (2 * number - 1), sum(numbers) * 2 * number] for number in numbers]
    assert [rank["gathered"] for rank in results] == [[whole, gradient] for gradient in gradients]


def test_on_one_rank_the_slice_and_its_attention_are_the_whole():
    x = torch.randn(4)
    assert gather_slices(x, Axis()) is x
    qkv, packed = torch.randn(5, 1, 3, 4), packed_batch(3, 2).sequence
    assert torch.equal(attended(qkv, packed, None, Axis()), packed_attention(qkv, packed, None))
