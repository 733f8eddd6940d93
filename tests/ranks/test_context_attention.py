"""Attention of tokens that are split over the context axis against the same on one rank."""

import itertools
from unittest.mock import patch

import pytest
import torch
from torch.nn import functional as F

from megatron.kernels.attention import Boundaries, _flash, packed_attention, share_of
from megatron.parallel.collectives import gather_slices
from megatron.parallel.mesh import Axis
from tests.ranks.launch import run_ranks

HEADS, WIDTH = 2, 8
# Lengths of proteins, those of padding included, by what is special about how 2 and 4 ranks share them.
CASES = {
    "proteins across ranks": (5, 9, 2, 8),
    "one protein on all ranks": (24,),
    "ranks with padding alone": (3, 2, 19),
    "proteins of one token": (1,) * 8,
    "no tokens": (),
}
# Relative to the norm of the tensor.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}


def bounds(lengths):
    return Boundaries(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), lengths)


def normal(*shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def flash_by_definition(query, key, value, query_ends, key_ends, longest_query, longest_key, *_):
    """Stands for the operator of GPUs, which has no kernel on CPUs."""
    assert (query_ends.diff().max(), key_ends.diff().max()) == (longest_query, longest_key)
    assert query_ends.diff().min() > 0
    spans = zip(itertools.pairwise(query_ends.tolist()), itertools.pairwise(key_ends.tolist()), strict=True)
    proteins = [(query[slice(*mine)], key[slice(*whole)], value[slice(*whole)]) for mine, whole in spans]
    return [torch.cat([F.scaled_dot_product_attention(*(tensor.transpose(0, 1) for tensor in protein)).transpose(0, 1)
                       for protein in proteins])]


def flash(qkv, boundaries, dropout, axis):
    with patch.object(torch.ops.aten, "_flash_attention_forward", flash_by_definition):
        return _flash(qkv, boundaries.cu_seqlens, share_of(boundaries.lengths, axis), dropout, axis)


WAYS = {"reference": packed_attention, "flash": flash}
# Without tokens neither way is taken.
CASES_AND_WAYS = [(case, way) for case, lengths in CASES.items() for way in (WAYS if lengths else ["reference"])]


def slices(lengths, dtype, axis):
    """This rank's tokens of queries, keys and values, and of the gradient of their context."""
    size = sum(lengths) // axis.size
    mine = slice(axis.rank * size, (axis.rank + 1) * size)
    qkv = normal(sum(lengths), HEADS, 3, WIDTH, dtype=dtype, seed=0)[mine].requires_grad_()
    return qkv, normal(sum(lengths), HEADS, WIDTH, dtype=dtype, seed=1)[mine]


def context_and_gradient(attend, lengths, dtype, axis):
    qkv, weights = slices(lengths, dtype, axis)
    context = attend(qkv, bounds(lengths), 0.0, axis)
    return [context.detach(), *torch.autograd.grad(context, qkv, weights)]


def with_dropout(axis):
    """Context times the gradient to it, and values times theirs; how many elements are kept, and of which kinds."""
    lengths, kept = CASES["proteins across ranks"], []
    qkv, weights = slices(lengths, torch.float32, axis)
    torch.manual_seed(axis.rank)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        context = packed_attention(qkv, bounds(lengths), 0.3, axis)
    gradient, = torch.autograd.grad(context, qkv, weights)
    share = share_of(lengths, axis)
    num_scores = sum(HEADS * q * k for q, k in zip(share.query_lengths, share.key_lengths, strict=True))
    return {"products": [(context * weights).sum().item(), (qkv * gradient)[:, :, 2].sum().item()],
            "kept": sum(kept), "own and scores": [qkv.numel(), num_scores]}


def gathered(axis):
    """The whole of tokens 1, 2 times the rank's number from 1, and the gradient for output gradients likewise."""
    tokens = ((axis.rank + 1) * torch.arange(1., 3.)).requires_grad_()
    whole = gather_slices(tokens, axis)
    gradient, = torch.autograd.grad(whole, tokens, (axis.rank + 1) * torch.arange(1., 1 + len(whole)))
    return [whole.tolist(), gradient.tolist()]


def on_one_rank_of_many(axis):
    """All that the tests below ask about, in one launch of the ranks."""
    contexts = {(case, way, dtype): context_and_gradient(WAYS[way], CASES[case], dtype, axis)
                for case, way in CASES_AND_WAYS for dtype in TOLERANCE}
    return {"contexts": contexts, "with dropout": with_dropout(axis), "gathered": gathered(axis)}


@pytest.fixture(scope="module", params=[2, 4])
def results(request):
    return run_ranks(on_one_rank_of_many, request.param)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("case", "way"), CASES_AND_WAYS)
def test_context_and_gradient_are_those_of_one_rank(results, case, way, dtype):
    expected = context_and_gradient(packed_attention, CASES[case], dtype, Axis())
    contexts, gradients = zip(*(rank["contexts"][case, way, dtype] for rank in results), strict=True)
    for split, whole in zip((torch.cat(contexts), torch.cat(gradients)), expected, strict=True):
        assert split.shape == whole.shape
        assert (split - whole).float().norm() <= TOLERANCE[dtype] * whole.float().norm()


def test_the_gradient_has_the_dropout_of_the_context(results):
    """The context is linear in the values, so both sums are the same."""
    by_context, by_gradient = torch.tensor([rank["with dropout"]["products"] for rank in results]).sum(0).tolist()
    assert by_gradient == pytest.approx(by_context, rel=1e-5)


def test_other_ranks_keys_and_values_are_not_kept_for_the_backward_pass(results):
    for rank in results:
        own, num_scores = rank["with dropout"]["own and scores"]
        assert rank["with dropout"]["kept"] == own + 2 * num_scores  # probabilities and what dropout keeps of them


def test_gathered_slices_are_whole_and_their_gradients_are_summed(results):
    numbers = range(1, len(results) + 1)
    whole = [number * token for number in numbers for token in (1, 2)]
    gradients = [[sum(numbers) * (2 * number - 1), sum(numbers) * 2 * number] for number in numbers]
    assert [rank["gathered"] for rank in results] == [[whole, gradient] for gradient in gradients]


def test_on_one_rank_the_slice_is_the_whole():
    x = torch.randn(4)
    assert gather_slices(x, Axis()) is x
