"""The contents of a micro-batch, and that its shape does not depend on them."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.data.batches.batch import BatchShape, collate
from megatron.data.rows.packed import Row
from megatron.kernels.packed_sequence import NO_TARGET, protein_lengths


def row(lengths, seed=0, every=3):
    """Tokens that differ, of which each `every`-th is to be predicted."""
    tokens = np.arange(sum(lengths)) + 1000 * (seed + 1)
    targets = np.flatnonzero((tokens + seed) % every == 0)
    return Row(tokens, np.array(lengths, dtype=np.int64), targets, -tokens[targets])


def test_a_batch_is_its_rows_flat_with_filler_behind_them():
    rows = [row((5, 3)), row((), seed=1), row((1, 9), seed=2)]
    batch = collate(rows, BatchShape(num_tokens=24, num_proteins=6, num_targets=12, max_length=9))
    sequence = batch.sequence
    assert sequence.tokens_t.tolist() == [token for each in rows for token in each.tokens_t] + [0] * 6
    assert sequence.positions_t.tolist() == [*range(5), *range(3), 0, *range(9)] + [0] * 6
    assert sequence.cu_seqlens.tolist() == [0, 5, 8, 9, 18, 18, 18, 24, 24, 24]
    assert (batch.num_tokens, batch.num_residues, batch.num_pairs) == (18, 14, 25 + 9 + 1 + 81)
    assert batch.num_targets == sum(len(each.target_ids_m) for each in rows)
    assert all(torch.equal(*pair) for pair in zip(batch.to("cpu").targets.tensors(), batch.targets.tensors(),
                                                  strict=True))


def test_without_filler_only_what_evens_the_tokens_up_is_left_of_it():
    batch = collate([row((5, 3))], BatchShape(num_tokens=24, num_proteins=3, num_targets=4, max_length=9))
    sequence = batch.without_filler(token_multiple=3).sequence
    assert sequence.tokens_t.tolist() == batch.sequence.tokens_t[:9].tolist()
    assert sequence.positions_t.tolist() == [*range(5), *range(3), 0]
    assert sequence.cu_seqlens.tolist() == [0, 5, 8, 8, 9, 9, 9]
    nothing = collate([], BatchShape(num_tokens=24, num_proteins=3, num_targets=4, max_length=9)).without_filler(2)
    assert len(nothing.sequence.tokens_t) == 2  # no layer is given no token


@st.composite
def shared_out(draw):
    """Rows, and the shapes in which each of some ranks takes its share of them."""
    every, num_shares = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    lengths = draw(st.lists(st.lists(st.integers(1, 9), max_size=5), max_size=3))
    rows = [row(each, seed, every) for seed, each in enumerate(lengths)]
    num_tokens = sum(map(sum, lengths)) + draw(st.integers(0, 30))
    num_tokens += -num_tokens % num_shares
    num_proteins = sum(map(len, lengths)) + draw(st.integers(1, 3))
    num_targets = sum(len(each.target_ids_m) for each in rows) + draw(st.integers(0, 3))
    longest = draw(st.integers(max(map(max, filter(None, lengths)), default=1), 12))
    return rows, [BatchShape(num_tokens, num_proteins, num_targets, longest, share, num_shares)
                  for share in range(num_shares)]


@given(shared_out())
def test_shares_are_together_the_micro_batch_and_each_target_lies_in_one(drawn):
    rows, shapes = drawn
    shares = [collate(rows, shape) for shape in shapes]
    tokens = torch.cat([batch.sequence.tokens_t for batch in shares]).tolist()
    real = [token for each in rows for token in each.tokens_t]
    assert tokens == real + [0] * (shapes[0].num_tokens - len(real))
    positions = torch.cat([batch.sequence.positions_t for batch in shares]).tolist()
    assert positions[:len(real)] == [place for each in rows for length in each.lengths for place in range(length)]
    found = []
    for batch in shares:
        is_target = batch.targets.ids_m != NO_TARGET
        assert not batch.targets.positions_m[~is_target].any()
        at_targets = batch.sequence.tokens_t[batch.targets.positions_m[is_target]]
        assert torch.equal(at_targets, -batch.targets.ids_m[is_target])
        found += at_targets.tolist()
    assert found == [-number for each in rows for number in each.target_ids_m]


@given(shared_out())
def test_the_shape_is_that_of_no_rows_and_segments_are_no_longer_than_proteins(drawn):
    rows, shapes = drawn
    lengths = [length for each in rows for length in each.lengths]
    for shape in shapes:
        batch, nothing = collate(rows, shape), collate([], shape)
        for ours, other in ((batch.sequence, nothing.sequence), (batch.targets, nothing.targets)):
            assert [(t.shape, t.dtype) for t in ours.tensors()] == [(t.shape, t.dtype) for t in other.tensors()]
        ends, num_filler = batch.sequence.cu_seqlens, batch.sequence.num_filler
        assert (ends.dtype, ends[0], ends[-1]) == (torch.int32, 0, shape.num_tokens)
        assert all((ends.diff() >= 0) & (ends.diff() <= shape.max_length))
        assert protein_lengths(ends, num_filler) == lengths


def test_more_proteins_than_foreseen_pad_to_twice_or_four_times_as_many():
    shape = BatchShape(num_tokens=40, num_proteins=4, num_targets=40, max_length=10)
    sizes = {count: len(collate([row((1,) * count)], shape).sequence.cu_seqlens) - 1 - shape.num_filler
             for count in (0, 4, 5, 8, 9, 16)}
    assert sizes == {0: 4, 4: 4, 5: 8, 8: 8, 9: 16, 16: 16}
