"""The attention kernel against its definition."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron.kernels.attention import Boundaries, attention_reference, packed_attention, share_of
from megatron.parallel.mesh import Axis


def boundaries(*lengths):
    return Boundaries(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), lengths)


@pytest.mark.parametrize("lengths", [(1,), (7, 1, 30), (64, 64), (2, 3, 5, 7, 11)])
def test_fast_path_equals_the_definition(lengths):
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 4, 3, 8, requires_grad=True)
    fast, slow = (function(qkv, boundaries(*lengths), 0.0) for function in (packed_attention, attention_reference))
    torch.testing.assert_close(fast, slow, atol=2e-6, rtol=1e-5)
    weights = torch.randn_like(slow)
    grads = [torch.autograd.grad(context, qkv, weights)[0] for context in (fast, slow)]
    torch.testing.assert_close(*grads, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradient_is_the_derivative_also_with_dropout(dropout):
    qkv = torch.randn(11, 2, 3, 4, dtype=torch.float64, requires_grad=True)

    def context(x):
        torch.manual_seed(5)
        return packed_attention(x, boundaries(6, 1, 4), dropout)

    assert torch.autograd.gradcheck(context, (qkv,))


def test_packed_proteins_do_not_attend_across():
    qkv = torch.randn(20, 2, 3, 8)
    before = packed_attention(qkv, boundaries(12, 8), 0.0)
    qkv[12:] = torch.randn(8, 2, 3, 8)
    after = packed_attention(qkv, boundaries(12, 8), 0.0)
    assert torch.equal(before[:12], after[:12])
    assert not torch.equal(before[12:], after[12:])


def test_dropout_keeps_the_expected_context():
    torch.manual_seed(0)
    qkv = torch.randn(40, 2, 3, 8)
    contexts = torch.stack([packed_attention(qkv, boundaries(25, 15), 0.2) for _ in range(600)])
    plain = packed_attention(qkv, boundaries(25, 15), 0.0)
    standard_error = contexts.std(0) / 600**0.5
    assert ((contexts.mean(0) - plain).abs() < 6 * standard_error + 1e-6).all()


def test_bf16_error_is_at_most_twice_the_definitions():
    torch.manual_seed(0)
    qkv = torch.randn(96, 4, 3, 16)
    exact = attention_reference(qkv, boundaries(60, 36), 0.0)
    half = qkv.bfloat16()
    errors = [(function(half, boundaries(60, 36), 0.0).float() - exact).abs().max()
              for function in (packed_attention, attention_reference)]
    assert errors[0] <= 2 * errors[1]


def test_no_proteins_give_no_context():
    assert packed_attention(torch.zeros(0, 2, 3, 4), boundaries(), 0.0).shape == (0, 2, 4)


def test_tensors_that_stand_for_a_gpus_take_its_operator_and_get_their_gradient():
    with FakeTensorMode():
        qkv = torch.empty(9, 2, 3, 8, dtype=torch.bfloat16, requires_grad=True)
        context = packed_attention(qkv, Boundaries(torch.empty(3, dtype=torch.int32), (5, 4)), 0.1)
        assert context.shape == (9, 2, 8)
        assert context.grad_fn.name() == "FlashAttentionBackward0"
        context.backward(torch.empty_like(context))
    assert qkv.grad.shape == qkv.shape


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 5))
def test_the_shares_of_context_ranks_have_each_token_once_and_whole_proteins_as_keys(lengths, num_ranks):
    lengths = (*lengths, -sum(lengths) % num_ranks)
    ends = list(itertools.accumulate(lengths, initial=0))
    queries_of = [[] for _ in lengths]
    for rank in range(num_ranks):
        share = share_of(lengths, Axis(rank, num_ranks))
        query = rank * sum(lengths) // num_ranks
        key = share.key_start
        for protein, (num_queries, num_keys) in enumerate(zip(share.query_lengths, share.key_lengths, strict=True),
                                                          share.first):
            assert (key, key + num_keys) == (ends[protein], ends[protein + 1])
            assert num_queries > 0 or not num_keys
            queries_of[protein] += range(query, query + num_queries)
            query, key = query + num_queries, key + num_keys
        assert query == (rank + 1) * sum(lengths) // num_ranks
    assert queries_of == [list(range(*span)) for span in itertools.pairwise(ends)]
