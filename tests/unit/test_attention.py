"""The attention kernel agrees with its definition."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen

from megatron.kernels.attention import fused
from megatron.kernels.attention.by_protein import attention_by_protein, tiles_of
from megatron.kernels.attention.packed import attention_reference, packed_attention
from megatron.kernels.dropout import Dropout, Use
from tests.packed import fused_by_definition, packed_batch


def packed(*lengths, **padding):
    return packed_batch(*lengths, **padding).sequence


def weights_dropout(rate, seed=2**62 + 5, device="cpu"):
    return Dropout(rate, torch.tensor(seed, device=device), Use.PROBABILITIES, first_head=3) if rate else None


def eager(qkv, sequence, dropout, window=None):
    """What `packed_attention` takes where the C++ helper is missing."""
    return attention_by_protein(qkv, sequence, dropout, window)


def operator(qkv, sequence, dropout, window=None):
    """The same under torch.compile."""
    left, right = window or (-1, -1)
    seed, rate, head = (dropout.seed, dropout.rate, dropout.first_head) if dropout else (None, 0.0, 0)
    return torch.ops.megatron.attention_by_protein(qkv, sequence.cu_seqlens, seed, sequence.num_filler, left, right,
                                                   rate, head)[0].flatten(1, 2)


@pytest.mark.parametrize("padding", [{}, {"filler": 9, "empty": 3}], ids=["full", "with filler"])
@pytest.mark.parametrize("lengths", [(1,), (7, 1, 30), (64, 64), (2, 3, 5, 7, 11)])
def test_fast_path_equals_the_definition_and_the_filler_has_no_part_in_it(lengths, padding):
    torch.manual_seed(0)
    sequence, size = packed(*lengths, **padding), sum(lengths)
    qkv = torch.randn(len(sequence.tokens_t), 4, 3, 8, requires_grad=True)
    fast, slow = (function(qkv, sequence, None) for function in (packed_attention, attention_reference))
    torch.testing.assert_close(fast[:size], slow[:size], atol=2e-6, rtol=1e-5)
    weights = torch.randn(size, 4, 8)
    grads = [torch.autograd.grad(context[:size], qkv, weights, retain_graph=True)[0] for context in (fast, slow)]
    torch.testing.assert_close(*grads, atol=5e-6, rtol=1e-5)
    # Whatever gradient comes to the filler goes no further.
    everywhere, = torch.autograd.grad(fast, qkv, torch.cat([weights, torch.full_like(fast[size:], 1e6)]))
    assert torch.equal(everywhere, grads[0])
    assert not fast[size:].any()


@pytest.mark.parametrize("window", [None, (0, 0), (3, 1), (200, 100), (2, 500)], ids=str)
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_groups_of_queries_windows_and_dropout_follow_the_definition(queries, window, rate):
    torch.manual_seed(0)
    sequence, size = packed(300, 1, 141, 7, filler=9, empty=2), 449
    qkv = torch.randn(len(sequence.tokens_t), 2, queries + 2, 8, requires_grad=True)
    contexts = [function(qkv, sequence, weights_dropout(rate), window)[:size]
                for function in (packed_attention, eager, attention_reference)]
    weights = torch.randn_like(contexts[0])
    gradients = [torch.autograd.grad(context, qkv, weights)[0] for context in contexts]
    for way in range(2):
        torch.testing.assert_close(contexts[way], contexts[2], atol=4e-6, rtol=1e-5)
        torch.testing.assert_close(gradients[way], gradients[2], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dropout", [None, weights_dropout(0.4)])
def test_gradient_is_the_derivative_also_with_dropout(dropout):
    sequence = packed(4, 1, 2, filler=1)
    qkv = torch.randn(8, 2, 3, 2, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(lambda x: packed_attention(x, sequence, dropout), (qkv,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [None, weights_dropout(0.3)])
def test_the_operator_for_compiled_graphs_gives_the_same_bits(dtype, dropout):
    cases = [(lengths, filler, 1, None) for lengths, filler in (((9, 1, 30), 5), ((12,), 0), ((), 4), ((), 0))]
    for lengths, filler, queries, window in [*cases, ((150, 140), 3, 2, (40, 7))]:
        sequence = packed(*lengths, filler=filler, empty=1)
        qkv = torch.randn(len(sequence.tokens_t), 2, queries + 2, 8).to(dtype).requires_grad_()
        outcomes = []
        for way in (eager, operator):
            context = way(qkv, sequence, dropout, window)
            outcomes.append((context, *torch.autograd.grad(context, qkv, torch.ones_like(context) + context)))
        assert all(torch.equal(*pair) for pair in zip(*outcomes, strict=True))


def test_the_operator_is_what_torch_expects_of_one():
    sequence = packed(5, 2, filler=3)
    qkv = torch.randn(10, 2, 4, 4, requires_grad=True)
    arguments = qkv, sequence.cu_seqlens, torch.tensor(3), sequence.num_filler, 3, 1, 0.2, 0
    torch.library.opcheck(torch.ops.megatron.attention_by_protein.default, arguments)
    context, kept = torch.ops.megatron.attention_by_protein(*arguments)
    torch.library.opcheck(torch.ops.megatron.attention_by_protein_backward.default,
                          (torch.ones_like(context), qkv.detach(), sequence.cu_seqlens, kept.detach(),
                           sequence.num_filler, 3, 1, True))


@pytest.mark.parametrize("way", [packed_attention, eager])
def test_a_gradient_of_the_gradient_is_refused_rather_than_wrong(way):
    qkv = torch.randn(12, 2, 3, 8, requires_grad=True)
    context = way(qkv, packed(5, 7), None)
    gradient, = torch.autograd.grad(context.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(("takes_cudnn", "window", "given"), [
    (True, None, (9, 9)), (True, (3, 4), (3, 4)), (False, None, (-1, -1))])
def test_where_varlen_would_take_cudnn_it_gets_a_window_that_ends_nowhere(takes_cudnn, window, given, monkeypatch):
    said = []

    def varlen_attn(query, *_, window_size):
        said.append(window_size)
        return query

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(fused, "_TAKES_CUDNN", takes_cudnn)
    fused.varlen_attention(torch.randn(3, 14, 2, 8).unbind(), packed(9, 5), window=window)
    assert said == [given]


def test_packed_proteins_do_not_attend_across():
    sequence = packed(12, 8, filler=4)
    qkv = torch.randn(24, 2, 3, 8)
    before = packed_attention(qkv, sequence, None)
    qkv[12:] = torch.randn(12, 2, 3, 8)
    after = packed_attention(qkv, sequence, None)
    assert torch.equal(before[:12], after[:12])
    assert not torch.equal(before[12:], after[12:])


def test_dropout_keeps_the_expected_context():
    torch.manual_seed(0)
    qkv = torch.randn(40, 2, 3, 8)
    contexts = torch.stack([packed_attention(qkv, packed(25, 15), weights_dropout(0.2, seed)) for seed in range(600)])
    plain = packed_attention(qkv, packed(25, 15), None)
    standard_error = contexts.std(0) / 600**0.5
    assert ((contexts.mean(0) - plain).abs() < 6 * standard_error + 1e-6).all()


def test_bf16_error_is_at_most_twice_the_definitions():
    torch.manual_seed(0)
    qkv = torch.randn(96, 4, 3, 16)
    exact = attention_reference(qkv, packed(60, 36), None)
    half = qkv.bfloat16()
    errors = [(function(half, packed(60, 36), None).float() - exact).abs().max()
              for function in (packed_attention, attention_reference)]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize(("dtype", "dropout", "queries", "width", "name"), [
    (torch.bfloat16, 0.0, 1, 8, "varlen"), (torch.bfloat16, 0.1, 1, 8, "triton"), (torch.float32, 0.0, 1, 8, "triton"),
    (torch.bfloat16, 0.0, 2, 8, "triton"), (torch.bfloat16, 0.0, 1, 12, "triton")])
def test_each_fused_operator_gets_what_it_can_take(dtype, dropout, queries, width, name):
    sequence = packed(9, 1, 5, filler=20, empty=3)
    qkv = torch.randn(35, 2, queries + 2, width).to(dtype).requires_grad_()
    with fused_by_definition() as calls:
        context = packed_attention(qkv, sequence, weights_dropout(dropout))
    assert calls == [(name, dropout)]
    expected = attention_reference(qkv.float(), sequence, weights_dropout(dropout))
    assert (context - expected)[:15].norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize(("dtype", "dropout", "node"), [(torch.bfloat16, 0.0, "_varlen_attn"),
                                                        (torch.bfloat16, 0.1, "fused_attention"),
                                                        (torch.float32, 0.0, "fused_attention")])
@pytest.mark.parametrize("queries", [1, 2])
def test_tensors_that_stand_for_a_gpus_take_its_operator_and_get_their_gradient(dtype, dropout, node, queries):
    sequence = packed(5, 4, filler=3, empty=2)
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
        qkv = torch.empty(12, 2, queries + 2, 8, dtype=dtype, requires_grad=True)
        stands = weights_dropout(dropout) and replace(weights_dropout(dropout), seed=fakes.from_tensor(torch.tensor(0)))
        context = packed_attention(qkv, sequence.map(fakes.from_tensor), stands)
        assert context.shape == (12, 2 * queries, 8)
        names, waiting = set(), [context.grad_fn]
        while waiting:
            found = waiting.pop()
            names.add(found.name())
            waiting += [function for function, _ in found.next_functions if function is not None]
        assert any((node if queries == 1 else "fused_attention") in name for name in names), names
        context.backward(torch.empty_like(context))
    assert qkv.grad.shape == qkv.shape


@pytest.mark.parametrize(("dtype", "dropout"), [(torch.bfloat16, 0.0), (torch.bfloat16, 0.1), (torch.float32, 0.0)])
def test_a_graph_takes_the_fused_operators_whole(dtype, dropout):
    sequence = packed(5, 4, filler=3, empty=2).map(lambda tensor: tensor.to("meta"))
    qkv = torch.empty(12, 2, 3, 8, dtype=dtype, device="meta", requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(packed_attention, backend="aot_eager", fullgraph=True, dynamic=False)
    context = compiled(qkv, sequence, weights_dropout(dropout, device="meta"))
    context.backward(torch.empty_like(context))
    assert qkv.grad.shape == qkv.shape


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 5), st.integers(0, 20))
def test_the_tiles_of_context_ranks_have_each_token_once_and_whole_proteins_as_keys(lengths, num_ranks, filler):
    total = sum(lengths) + filler
    total += -total % num_ranks
    ends = list(itertools.accumulate(lengths, initial=0))
    queries_of = {span: [] for span in itertools.pairwise(ends)}
    for rank in range(num_ranks):
        start, stop, reached = rank * total // num_ranks, (rank + 1) * total // num_ranks, 0
        for tile in tiles_of(lengths, start, stop):
            assert tile.queries.start == reached < tile.queries.stop
            assert tile.shift == start + tile.queries.start - tile.keys.start
            queries_of[tile.keys.start, tile.keys.stop] += range(start + tile.queries.start, start + tile.queries.stop)
            reached = tile.queries.stop
        assert start + reached == max(min(stop, ends[-1]), start)
    assert queries_of == {span: list(range(*span)) for span in itertools.pairwise(ends)}


def test_a_windows_tiles_are_no_wider_than_their_queries_and_the_window():
    tiles = tiles_of([1000, 3], 0, 1003, (20, 10))
    assert all(tile.num_keys <= tile.num_queries + 30 for tile in tiles)
    assert max(tile.num_queries for tile in tiles) == 128
