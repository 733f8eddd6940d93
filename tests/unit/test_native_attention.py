"""The native attention on CPUs agrees with its definition, with every instruction set of this processor."""

from dataclasses import replace

import pytest
import torch

from megatron.kernels.attention import native
from megatron.kernels.attention.backends import BACKENDS, choose
from megatron.kernels.attention.packed import attention_reference, packed_attention
from megatron.kernels.dropout import Dropout, Use
from tests.packed import packed_batch

pytestmark = pytest.mark.skipif(not native.INSTRUCTION_SETS,
                                reason="megatron.kernels.attention._packed_attention is not built")
every_instruction_set = pytest.mark.parametrize("instructions", native.INSTRUCTION_SETS)
WINDOWS = [None, (5, 70), (200, 1)]


def outcome(way, qkv, weights):
    """The context and the gradient of what `way` makes of these."""
    qkv = qkv.clone().requires_grad_()
    context = way(qkv)
    return context.detach(), *torch.autograd.grad(context, qkv, weights)


def outcomes(sequence, qkv, window=None, instructions=""):
    """Of the helper, of the definition in the same precision, and of that in fp64; the filler's are left out."""
    weights = torch.randn(len(qkv), qkv.shape[1] * (qkv.shape[2] - 2), qkv.shape[3]).to(qkv.dtype)
    size = int(sequence.cu_seqlens[len(sequence.cu_seqlens) - 1 - sequence.num_filler])
    weights[size:] = 0

    def ours(x):
        return native.native_attention(x, sequence, None, window, instructions)

    def definition(x):
        return attention_reference(x, sequence, None, window)

    three = (outcome(ours, qkv, weights), outcome(definition, qkv, weights),
             outcome(definition, qkv.double(), weights.double()))
    return [tuple(tensor[:size].double() for tensor in each) for each in three]


@every_instruction_set
@pytest.mark.parametrize("width", [7, 8, 16, 20, 24, 32, 64, 128])
def test_context_and_gradient_follow_the_definition(width, instructions):
    torch.manual_seed(width)
    for queries, lengths in ((1, (7, 1, 200)), (3, (65, 1, 33)), (1, (1,)), (1, ())):
        for window in WINDOWS if width in (7, 16) else [None]:
            sequence = packed_batch(*lengths, filler=5, empty=2).sequence
            qkv = torch.randn(sum(lengths) + 5, 2, queries + 2, width)
            ours, _, exact = outcomes(sequence, qkv, window, instructions)
            for mine, right in zip(ours, exact, strict=True):
                torch.testing.assert_close(mine, right, atol=2e-5, rtol=1e-5)


@every_instruction_set
@pytest.mark.parametrize("width", [7, 16, 24, 64])
def test_bf16_errors_are_at_most_twice_the_definitions(width, instructions):
    torch.manual_seed(width)
    sequence = packed_batch(150, 1, 83, filler=3).sequence
    for queries, window in ((1, None), (2, (30, 9))):
        qkv = torch.randn(237, 3, queries + 2, width).bfloat16()
        ours, plain, exact = outcomes(sequence, qkv, window, instructions)
        for mine, theirs, right in zip(ours, plain, exact, strict=True):
            assert (mine - right).abs().max() <= 2 * (theirs - right).abs().max()
            assert (mine - right).norm() <= 2 * (theirs - right).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_exponential_is_right_where_scores_differ_by_much(dtype):
    torch.manual_seed(0)
    sequence = packed_batch(130).sequence
    qkv = torch.randn(130, 2, 3, 16)
    qkv[:, :, 0] *= torch.logspace(-2, 2, 130)[:, None, None]  # scores up to several hundreds
    ours, plain, exact = outcomes(sequence, qkv.to(dtype))
    for mine, theirs, right in zip(ours, plain, exact, strict=True):
        assert (mine - right).norm() <= 2 * (theirs - right).norm()


def test_a_protein_of_3000_residues_follows_the_definition():
    torch.manual_seed(0)
    sequence = packed_batch(3000, 5).sequence
    ours, _, exact = outcomes(sequence, torch.randn(3005, 1, 3, 8))
    for mine, right in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, right, atol=2e-5, rtol=1e-5)


@every_instruction_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_depend_neither_on_the_threads_nor_on_what_else_is_packed(dtype, instructions):
    torch.manual_seed(0)
    qkv, weights = torch.randn(300, 2, 4, 24).to(dtype), torch.randn(300, 4, 24).to(dtype)
    results, threads = [], torch.get_num_threads()
    for number, lengths in ((1, (90, 210)), (3, (90, 210)), (2, (90, 10, 200))):
        sequence = packed_batch(*lengths).sequence
        torch.set_num_threads(number)
        try:
            results.append(outcome(lambda x, sequence=sequence: native.native_attention(
                x, sequence, None, None, instructions), qkv, weights))
        finally:
            torch.set_num_threads(threads)
    for one, three, other in zip(*results, strict=True):
        assert torch.equal(one, three)
        assert torch.equal(one[:90], other[:90])


def test_the_operator_is_what_torch_expects_of_one_and_gives_the_same_bits():
    sequence = packed_batch(5, 2, filler=3).sequence
    qkv = torch.randn(10, 2, 4, 4, requires_grad=True)
    arguments = qkv, sequence.cu_seqlens, torch.tensor(7), sequence.num_filler, 3, 1, 0.2, 1, ""
    torch.library.opcheck(torch.ops.megatron.native_attention.default, arguments)
    context, statistics = torch.ops.megatron.native_attention(*arguments)
    torch.library.opcheck(torch.ops.megatron.native_attention_backward.default,
                          (torch.ones_like(context), qkv.detach(), *arguments[1:3], context.detach(),
                           statistics.detach(), *arguments[3:]))
    eager = packed_attention(qkv, sequence, Dropout(0.2, torch.tensor(7), Use.PROBABILITIES, first_head=1), (3, 1))
    assert torch.equal(context.flatten(1, 2), eager)
    weights = torch.randn_like(eager)
    assert torch.equal(*(torch.autograd.grad(each, qkv, weights)[0] for each in (context.flatten(1, 2), eager)))


@every_instruction_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "window"), [(1, None), (3, (21, 9)), (1, (100, 3))])
def test_dropout_drops_the_weights_of_its_definition(queries, window, dtype, instructions):
    torch.manual_seed(queries)
    lengths, dropout = (601, 1, 90), Dropout(0.2, torch.tensor(2**62 + 12345), Use.PROBABILITIES, first_head=5)
    sequence = packed_batch(*lengths).sequence
    qkv = torch.randn(sum(lengths), 2, queries + 2, 16).to(dtype)
    weights = torch.randn(len(qkv), 2 * queries, 16).to(dtype)
    ours = outcome(lambda x: native.native_attention(x, sequence, dropout, window, instructions), qkv,
                   weights)
    plain = outcome(lambda x: attention_reference(x, sequence, dropout, window), qkv, weights)
    exact = outcome(lambda x: attention_reference(x, sequence, dropout, window), qkv.double(), weights.double())
    for mine, theirs, right in zip(ours, plain, exact, strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(mine, right.float(), atol=2e-5, rtol=1e-5)
        assert (mine.double() - right).norm() <= 2 * (theirs.double() - right).norm()


def test_what_is_not_a_number_stays_so():
    sequence = packed_batch(20, 20).sequence
    for row in range(3):
        qkv = torch.randn(40, 2, 3, 8)
        qkv[3, 1, row] = torch.nan
        context, gradient = outcome(lambda x: packed_attention(x, sequence, None), qkv, torch.ones(40, 2, 8))
        assert context[3, 1].isnan().all() and not context[20:].isnan().any() and not context[:, 0].isnan().any()
        assert gradient[3, 1].isnan().any() and not gradient[20:].isnan().any()


def test_the_helper_does_all_in_fp32_and_bf16_and_scores_never_reach_memory(monkeypatch):
    def refuse(*_):
        raise AssertionError("attention a protein at a time was taken")

    monkeypatch.setitem(BACKENDS, "plain", replace(BACKENDS["plain"], run=refuse))
    sequence = packed_batch(30).sequence
    for dtype in (torch.float32, torch.bfloat16):
        for dropout in (None, Dropout(0.1, torch.tensor(1), Use.PROBABILITIES)):
            packed_attention(torch.randn(30, 2, 3, 8).to(dtype), sequence, dropout)
    with pytest.raises(AssertionError):
        packed_attention(torch.randn(30, 2, 3, 8).double(), sequence, None)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_what_dtype_is_pytorchs_default_changes_nothing(default):
    torch.manual_seed(0)
    sequence, qkv = packed_batch(300, 200).sequence, torch.randn(500, 4, 3, 16)
    expected = packed_attention(qkv, sequence, None)
    torch.set_default_dtype(default)
    try:
        assert torch.equal(packed_attention(qkv, sequence, None), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_seed_below_zero_draws_what_the_definition_draws():
    sequence, qkv = packed_batch(9, 4).sequence, torch.randn(13, 2, 3, 8)
    dropout = Dropout(0.3, torch.tensor(-5), Use.PROBABILITIES)
    expected = attention_reference(qkv, sequence, dropout)
    assert torch.allclose(packed_attention(qkv, sequence, dropout), expected, atol=1e-5)


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="no way 'mmx'"):
        native.native_attention(torch.randn(4, 1, 3, 8), packed_batch(4).sequence, None, None, "mmx")


@pytest.mark.parametrize("tensor", [torch.empty(4, 2, 3, 9, device="meta"), torch.empty(4, 2, 3, 8).half()])
def test_what_is_not_on_the_host_or_of_another_dtype_is_left_to_the_other_ways(tensor):
    assert choose(tensor, False, None) != "compiled"
    assert choose(torch.empty(4, 2, 3, 9), False, None) == "compiled"


def test_every_start_finds_the_same_order_of_speed():
    """Which set is the fastest in bf16 is measured; another answer would change a resumed run's rounding."""
    assert {tuple(native._helper.instruction_sets()) for _ in range(50)} == {native.INSTRUCTION_SETS}
