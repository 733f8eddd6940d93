"""Dropout keeps the elements that an independent implementation of its generator keeps, on every path."""

import numpy as np
import pytest
import torch

from megatron.kernels.dropout import Dropout, Use, dropped, is_kept
from megatron.kernels.pointwise import native
from megatron.kernels.pointwise.residual_norm import after_dropout
from megatron.parallel.mesh import Axis
from megatron.parallel.tensor.stream import Stream
from tests.philox import kept, philox

SEED = 0x5DEECE66D1234567


def test_the_oracle_of_the_random_numbers_gives_those_of_its_authors():
    # The first and the last of the known answers that Random123 ships for philox4x32, of seven and of ten rounds.
    ones, pi = np.full(4, 0xFFFFFFFF), np.array([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344])
    assert [hex(x) for x in philox(np.zeros(4), 0, 10)] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
    assert [hex(x) for x in philox(ones, 2**64 - 1, 10)] == ["0x408f276d", "0x41c83b0e", "0xa20bc7c6", "0x6d5451fd"]
    assert [hex(x) for x in philox(pi, 0x299F31D0A4093822, 10)] == [
        "0xd16cfe09", "0x94fdcceb", "0x5001e420", "0x24126ea1"]
    assert [hex(x) for x in philox(np.zeros(4), 0, 7)] == ["0x5f6fb709", "0xd893f64", "0x4f121f81", "0x4f730a48"]


@pytest.mark.parametrize(("first_row", "columns", "first_head"), [(0, range(64), 0), (999, range(3, 50), 2),
                                                                  (2**31, range(16, 17), 7)])
def test_what_is_kept_is_what_an_independent_generator_says(first_row, columns, first_head):
    dropout = Dropout(0.2, torch.tensor(SEED), Use.PROBABILITIES, first_row, first_head)
    expected = kept(SEED, 0.2, range(first_row, first_row + 9), columns, range(first_head, first_head + 3), 0)
    assert np.array_equal(is_kept(dropout, 9, columns, 3).numpy(), expected)


def test_the_share_that_is_dropped_is_the_rate_and_what_is_kept_makes_up_for_it():
    x = dropped(torch.ones(1000, 512), Dropout(0.1, torch.tensor(SEED), Use.EMBEDDINGS))
    assert x.eq(0).float().mean().item() == pytest.approx(0.1, abs=4 * (0.09 / x.numel())**0.5)
    assert x.mean().item() == pytest.approx(1, abs=1e-3)
    assert not dropped(torch.ones(9, 9), Dropout(1.0, torch.tensor(SEED), Use.EMBEDDINGS)).any()


def test_each_seed_use_row_and_head_has_numbers_of_its_own():
    first = Dropout(0.5, torch.tensor(SEED), Use.ATTENTION_OUTPUT)
    others = [Dropout(0.5, torch.tensor(SEED + 1), Use.ATTENTION_OUTPUT),
              Dropout(0.5, torch.tensor(SEED), Use.FEED_FORWARD_OUTPUT), first.from_row(64),
              Dropout(0.5, torch.tensor(SEED), Use.ATTENTION_OUTPUT, first_head=1)]
    mask = is_kept(first, 64, range(64))
    for other in others:
        assert (is_kept(other, 64, range(64)) == mask).float().mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("width", [7, 64, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(not native.is_built(), reason="megatron.kernels.pointwise._pointwise is not built")
def test_native_code_drops_what_the_definition_drops(width, dtype):
    dropout = Dropout(0.3, torch.tensor(SEED), Use.FEED_FORWARD_OUTPUT, 1000)
    branch = torch.ones(300, width, dtype=dtype, requires_grad=True)
    out = after_dropout(branch, dropout)
    gradient, = torch.autograd.grad(out, branch, torch.ones_like(out))
    assert torch.equal(out > 0, is_kept(dropout, 300, range(width))[0]) and torch.equal(out, gradient)


def test_tokens_have_the_same_dropout_on_whatever_rank_they_are():
    x, dropout = torch.ones(24, 40), Dropout(0.5, torch.tensor(SEED), Use.EMBEDDINGS)
    whole = Stream().dropout(x, dropout)
    for context, tensor, is_split in ((2, 2, True), (3, 2, False), (1, 4, True)):
        parts = [Stream(Axis(rank=rank, size=tensor), is_split, Axis(rank=place, size=context))
                 for place in range(context) for rank in range(tensor if is_split else 1)]
        assert torch.equal(torch.cat([part.dropout(piece, dropout)
                                      for part, piece in zip(parts, x.chunk(len(parts)), strict=True)]), whole)
