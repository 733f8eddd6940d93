"""Rows of whole proteins: none lost, no row too long, and the native packer agrees with its Python twin."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.rows import packing
from megatron.data.rows.packing import PackedRows, order_key, pack, pack_in_python

SAMPLES = Path(__file__).resolve().parents[2].parent / "shared" / "fixtures" / "preprocess_set1"
NATIVE = pytest.mark.skipif(not packing.IS_NATIVE, reason="megatron.data.rows._packing is not built")

packings = st.sampled_from(["sequential", "best-fit"])
some_lengths = st.lists(st.integers(0, 90), max_size=300)
num_ends = st.sampled_from([1, 2])
keys = st.none() | st.integers(0, 2**64 - 1)


def pfam_like(count: int) -> np.ndarray:
    lengths = np.random.default_rng(3).lognormal(4.95, 0.55, count)
    return np.clip(lengths, 8, 2500).astype(np.int32)


def fill(rows: PackedRows, lengths: np.ndarray, seq_length: int) -> float:
    tokens = np.minimum(lengths, seq_length - 1).sum(dtype=np.int64) + len(lengths)
    return float(tokens) / (len(rows) * seq_length)


@settings(deadline=None)
@given(some_lengths, st.integers(1, 120), packings, keys, st.booleans(), num_ends)
def test_every_protein_is_in_one_row_and_no_row_is_too_full(lengths, most_residues, kind, key, drop_long, ends):
    seq_length = most_residues + ends
    sizes = np.array(lengths, dtype=np.int32)
    rows = pack(sizes, seq_length, kind, key=key, drop_long=drop_long, num_ends=ends)
    expected = [i for i, size in enumerate(lengths) if size > 0 and not (drop_long and size > most_residues)]
    assert sorted(rows.pieces.tolist()) == expected
    assert rows.row_starts[0] == 0 and rows.row_starts[-1] == len(expected)
    for index in range(len(rows)):
        row = rows.row(index)
        assert len(row) > 0
        assert np.minimum(sizes[row] + ends, seq_length).sum() <= seq_length


@NATIVE
@settings(deadline=None)
@given(some_lengths, st.integers(1, 120), packings, keys, st.booleans(), num_ends)
def test_the_native_packer_gives_the_rows_of_its_python_twin(lengths, most_residues, kind, key, drop_long, ends):
    seq_length = most_residues + ends
    for dtype in (np.int32, np.int64):
        native, twin = (packer(np.array(lengths, dtype=dtype), seq_length, kind, key=key, drop_long=drop_long,
                               num_ends=ends)
                        for packer in (pack, pack_in_python))
        np.testing.assert_array_equal(native.pieces, twin.pieces)
        np.testing.assert_array_equal(native.row_starts, twin.row_starts)
        assert native.pieces.dtype == twin.pieces.dtype


@NATIVE
@pytest.mark.parametrize("kind", ["sequential", "best-fit"])
def test_the_native_packer_gives_its_twins_rows_past_one_window_and_one_bucket(kind):
    lengths = pfam_like(20_000)
    native, twin = (packer(lengths, 512, kind, key=11) for packer in (pack, pack_in_python))
    np.testing.assert_array_equal(native.pieces, twin.pieces)
    np.testing.assert_array_equal(native.row_starts, twin.row_starts)


@NATIVE
@pytest.mark.parametrize("most_held", [1, 700, 19_999])
def test_shuffling_in_passes_that_hold_fewer_proteins_gives_the_same_rows(most_held):
    lengths = pfam_like(20_000)
    expected = pack(lengths, 512, "best-fit", key=11)
    pieces, row_starts = packing._packing.pack(lengths, 512, packing.WAITING_PIECES, 11, False, 1, most_held)
    np.testing.assert_array_equal(pieces, expected.pieces)
    np.testing.assert_array_equal(row_starts, expected.row_starts)


@NATIVE
def test_packing_with_both_ends_takes_no_more_memory_than_with_one():
    lengths, peaks = pfam_like(100_000), []
    for ends in (1, 2):
        tracemalloc.start()
        pack(lengths, 512, "best-fit", key=1, num_ends=ends)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + len(lengths)


@pytest.mark.parametrize("name, seq_length", [("20ns_128sl_1234s", 128), ("70ns_128sl_1234s", 128),
                                              ("40ns_512sl_7s", 512)])
def test_sequential_rows_begin_with_the_originals_windows(name, seq_length):
    if not SAMPLES.is_dir():
        pytest.skip("shared/fixtures/preprocess_set1 is not here")
    lengths = np.array([len(line) for line in (SAMPLES / "sequences.txt").read_text().split()], dtype=np.int32)
    stem = f"samples/spaced_text_document_train_indexmap_{name}"
    documents, starts = (np.load(SAMPLES / f"{stem}_{what}.npy") for what in ("doc_idx", "sample_idx"))
    rows = pack(lengths[documents], seq_length, "sequential", key=None)
    np.testing.assert_array_equal(rows.row_starts[:len(starts)], starts)
    assert rows.row_starts[-1] == len(documents)  # where the original leaves the last ones out


def test_sequential_sends_an_exact_fit_to_the_next_row_unless_alone():
    rows = pack(np.array([4, 4, 9, 30, 3, 5, 0], dtype=np.int32), 10, "sequential", key=None)
    assert [rows.row(i).tolist() for i in range(len(rows))] == [[0], [1], [2], [3], [4], [5]]


def test_best_fit_closes_gaps_exactly():
    rows = pack(np.array([5, 6, 3, 2, 1], dtype=np.int32), 10, "best-fit", key=None)
    both_ends = pack(np.array([4, 5, 2, 1], dtype=np.int32), 10, "best-fit", key=None, num_ends=2)
    assert [both_ends.row(i).tolist() for i in range(len(both_ends))] == [[0, 2], [1, 3]]
    assert [rows.row(i).tolist() for i in range(len(rows))] == [[0, 2], [1, 3], [4]]


@NATIVE
@pytest.mark.parametrize("seq_length", [2176, 512])
def test_best_fit_fills_99_percent_of_pfam_like_rows(seq_length):
    lengths = pfam_like(200_000)
    assert fill(pack(lengths, seq_length, "best-fit", key=1), lengths, seq_length) > 0.99


@NATIVE
def test_best_fit_keeps_the_shuffled_order_nearly():
    lengths = pfam_like(50_000)
    order = pack(lengths, 2176, "sequential", key=5).pieces.astype(np.int64)
    place = np.empty(len(order), dtype=np.int64)
    place[pack(lengths, 2176, "best-fit", key=5).pieces] = np.arange(len(order))
    assert np.abs(place[order] - np.arange(len(order))).max() < 4 * packing.WAITING_PIECES


def test_each_seed_and_epoch_has_an_order_of_its_own():
    lengths = np.full(200, 5, dtype=np.int32)
    orders = {tuple(pack(lengths, 64, "sequential", key=order_key(seed, epoch)).pieces)
              for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_the_shuffle_puts_every_protein_everywhere():
    places = np.array([np.argsort(pack(np.ones(20, np.int32), 3, "sequential", key=order_key(epoch)).pieces)
                       for epoch in range(1000)])
    assert np.all(np.abs(places.mean(axis=0) - 9.5) < 4 * 5.77 / np.sqrt(1000))


@NATIVE
def test_more_than_2_to_31_tokens_and_lengths_past_32_bits_do_not_overflow():
    lengths = np.full(2**9, 2**23 - 1, dtype=np.int32)  # 2^32 tokens
    rows = pack(lengths, 2**23, "best-fit", key=1)
    assert len(rows) == 2**9 and sorted(rows.pieces.tolist()) == list(range(2**9))
    huge = np.array([2**40, 3, 2**31, 2**32], dtype=np.int64)
    assert len(pack(huge, 16, "best-fit", key=None)) == 4
    assert pack(huge, 16, "best-fit", key=None, drop_long=True).pieces.tolist() == [1]
