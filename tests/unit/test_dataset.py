"""Packed datasets: every protein once per epoch, rows that depend only on seed, epoch and sample, long proteins."""

import dataclasses
import os
import pickle
import struct
import tempfile
import time
import tracemalloc
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config import DataConfig
from megatron.config.command_line import parse
from megatron.data.batches.batch import batch_shape, collate
from megatron.data.batches.loader import micro_batch_samples
from megatron.data.corpus import documents
from megatron.data.corpus.indexed_writer import IndexedWriter
from megatron.data.corpus.vocab import Vocab
from megatron.data.rows.dataset import build_datasets, measured_on
from megatron.data.rows.packed import PackedDataset
from megatron.errors import ConfigError, DataError
from megatron.log import Log
from megatron.parallel.mesh import Mesh
from megatron.train.setup import run
from tests.indexed_files import write_indexed

VOCAB = Vocab.from_file()


def write_proteins(prefix, lengths, seed=0):
    rng = np.random.default_rng(seed)
    proteins = [rng.choice(VOCAB.residue_ids, length) for length in lengths]
    write_indexed(prefix, proteins)
    return proteins


def config(prefix, **flags):
    flags = {"seq_length": 64, "split": "1,0,0", **flags}
    return DataConfig(data_path=(str(prefix),), **flags)


def originals(row, vocab=VOCAB, num_ends=1):
    """The proteins of a row before masking, as tuples, without their ends, which are checked."""
    tokens = row.tokens_t.copy()
    tokens[row.target_positions_m] = row.target_ids_m
    parts = np.split(tokens, np.cumsum(row.lengths)[:-1])
    for part in parts:
        assert [part[0], *part[len(part) - num_ends + 1:]] == [vocab.cls_id, vocab.sep_id][:num_ends]
    return [tuple(part[1:len(part) - num_ends + 1]) for part in parts]


def epoch_rows(dataset, epoch=0):
    first = sum(dataset.num_epoch_rows(before) for before in range(epoch))
    return [dataset[first + row] for row in range(dataset.num_epoch_rows(epoch))]


def same(left, right):
    return all(np.array_equal(a, b) for a, b in zip(dataclasses.astuple(left), dataclasses.astuple(right), strict=True))


@pytest.mark.parametrize("packing", ["best-fit", "sequential"])
def test_every_protein_comes_once_an_epoch_behind_its_cls(tmp_path, packing):
    proteins = write_proteins(tmp_path / "a", np.random.default_rng(1).integers(1, 64, 300))
    train = build_datasets(config(tmp_path / "a", packing=packing), VOCAB, 1).train
    for epoch in (0, 1):
        rows = epoch_rows(train, epoch)
        assert sorted(protein for row in rows for protein in originals(row)) == sorted(map(tuple, proteins))
        for row in rows:
            assert row.lengths.sum() == len(row.tokens_t) <= 64
            assert (row.tokens_t[np.cumsum(row.lengths) - row.lengths] == VOCAB.cls_id).all()


@pytest.mark.parametrize("packing", ["best-fit", "sequential"])
def test_each_epoch_of_a_dataset_has_an_order_of_its_own(tmp_path, packing):
    write_proteins(tmp_path / "a", [7] * 200)
    train = build_datasets(config(tmp_path / "a", packing=packing), VOCAB, 1).train
    assert not np.array_equal(train.rows(0).pieces, train.rows(1).pieces)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=60).filter(any), st.integers(2, 70), st.integers(0, 2**31),
       st.sampled_from(["best-fit", "sequential"]), st.integers(1, 4), st.integers(1, 3))
def test_ranks_together_see_every_protein_once_an_epoch(lengths, seq_length, seed, packing, data_size, micro_batch):
    with tempfile.TemporaryDirectory() as folder:
        proteins = write_proteins(Path(folder) / "a", lengths)
        data = config(Path(folder) / "a", seq_length=seq_length, packing=packing, long_proteins="split", split="1")
        train = build_datasets(data, VOCAB, seed).train
        first, last = train.num_epoch_rows(0), train.num_epoch_rows(0) + train.num_epoch_rows(1)
        seen = [piece for rank in range(data_size)
                for samples in micro_batch_samples(first, last, micro_batch, rank, data_size)
                for sample in samples for piece in originals(train[sample])]
    size = seq_length - 1
    assert sorted(seen) == sorted(tuple(protein[start:start + size]) for protein in proteins
                                  for start in range(0, len(protein), size))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=60).filter(any), st.integers(3, 70), st.integers(0, 2**31),
       st.sampled_from(["best-fit", "sequential"]), st.sampled_from(["split", "crop", "drop"]),
       st.sampled_from(["iupac", "esm", "protbert"]), st.sampled_from(["start", "both"]))
def test_every_protein_has_both_its_ends_and_the_models_ids(lengths, seq_length, seed, packing, long_proteins, family,
                                                            ends):
    vocab, size = Vocab.from_file(family), seq_length - (2 if ends == "both" else 1)
    if long_proteins == "drop" and not any(0 < length <= size for length in lengths):
        return
    with tempfile.TemporaryDirectory() as folder:
        written = write_proteins(Path(folder) / "a", lengths)
        data = config(Path(folder) / "a", seq_length=seq_length, packing=packing, long_proteins=long_proteins,
                      protein_ends=ends, mask_prob=(0.5,), mask_span_length=3.0)
        splits = build_datasets(data, vocab, seed)
        rows, shape = epoch_rows(splits.train), batch_shape(splits, 1)
    proteins = [tuple(vocab.ids[VOCAB.tokens[index]] for index in protein) for protein in written]
    found = [piece for row in rows for piece in originals(row, vocab, data.num_ends)]
    for row in rows:
        assert row.lengths.sum() == len(row.tokens_t) <= seq_length
        assert len(row.target_ids_m) and np.isin(row.target_ids_m, vocab.residue_ids).all()
        batch = collate([row], shape)
        assert batch.num_residues == sum(map(len, originals(row, vocab, data.num_ends)))
        assert batch.num_tokens == len(row.tokens_t)
    if long_proteins == "split":
        proteins = [protein[start:start + size] for protein in proteins for start in range(0, len(protein), size)]
    elif long_proteins == "drop":
        proteins = [protein for protein in proteins if 0 < len(protein) <= size]
    if long_proteins != "crop":
        assert sorted(found) == sorted(proteins)
        return
    cut = sorted(len(protein[:size]) for protein in proteins if protein)
    assert sorted(map(len, found)) == cut
    assert all(any(bytes(piece) in bytes(protein) for protein in proteins) for piece in found)


def test_how_full_rows_are_counts_both_ends(tmp_path):
    write_proteins(tmp_path / "a", [62, 30, 30])
    train = build_datasets(config(tmp_path / "a", protein_ends="both"), VOCAB, 1).train
    assert "2 rows an epoch, 100.00 % full" in train.describe()
    assert (train.longest(), train.most_targets(1), train.num_ends) == (64, round(0.15 * 62), 2)


@pytest.mark.parametrize("flags", [{}, {"long_proteins": "drop"}, {"long_proteins": "split"}, {"protein_ends": "both"}])
def test_what_a_split_holds_is_counted_in_little_memory(tmp_path, monkeypatch, flags):
    write_proteins(tmp_path / "a", np.random.default_rng(1).integers(0, 9, 50_000) ** 2)
    train = build_datasets(config(tmp_path / "a", **flags), VOCAB, 1).train
    whole, most = train.describe(), train.most_proteins(3)
    monkeypatch.setattr(documents, "CHUNK_DOCUMENTS", 1000)
    tracemalloc.start()
    try:
        assert (train.describe(), train.most_proteins(3)) == (whole, most)
        assert tracemalloc.get_traced_memory()[1] < 50_000
    finally:
        tracemalloc.stop()


def test_a_rank_that_prints_nothing_does_not_count_what_a_split_holds(tmp_path, monkeypatch):
    write_proteins(tmp_path / "a", [40, 20])
    flags = ["--data-path", str(tmp_path / "a"), "--preset", "demo", "--split", "1"]
    monkeypatch.setattr(PackedDataset, "describe", lambda dataset: pytest.fail("counts"))
    monkeypatch.setattr(run, "_build_engine", Mock(side_effect=InterruptedError))
    with pytest.raises(InterruptedError):
        run.build(parse(flags)[0], Mesh(), Log(is_speaker=False))


def test_mapped_ids_are_counted_and_said_and_own_ones_are_not_mapped(tmp_path):
    proteins = write_proteins(tmp_path / "a", [40, 20])
    esm = Vocab.from_file("esm")
    own, mapped = (build_datasets(config(tmp_path / "a"), vocab, 1).train for vocab in (VOCAB, esm))
    counts, expected = mapped.residue_counts(), np.bincount(np.concatenate(proteins), minlength=VOCAB.size)
    assert {esm.tokens[i]: n for i, n in enumerate(counts) if n} == {VOCAB.tokens[i]: n for i, n in enumerate(expected)
                                                                     if n}
    assert "ids mapped by letter" in mapped.describe() and "mapped" not in own.describe()
    assert all(np.array_equal(own.rows(0).row(i), mapped.rows(0).row(i)) for i in range(own.num_epoch_rows(0)))


def test_an_end_that_preprocessing_wrote_is_not_doubled(tmp_path):
    write_indexed(tmp_path / "a", [np.array([6, 7, VOCAB.sep_id])])
    with pytest.raises(DataError, match="a: its proteins end with .SEP. already, .*without --append-eod"):
        build_datasets(config(tmp_path / "a", protein_ends="both"), VOCAB, 1)
    assert build_datasets(config(tmp_path / "a"), Vocab.from_file("esm"), 1).train[0].tokens_t[-1] == 2


def test_a_row_depends_on_seed_and_sample_alone(tmp_path):
    write_proteins(tmp_path / "a", np.random.default_rng(1).integers(1, 90, 200))
    first = build_datasets(config(tmp_path / "a"), VOCAB, 1).train
    late = 3 * first.num_epoch_rows(0) + 5
    expected = [first[sample] for sample in range(late + 1)]
    fresh = build_datasets(config(tmp_path / "a", data_cache_path=str(tmp_path / "cache")), VOCAB, 1).train
    for sample in (late, 0, 17, late - 1):
        assert same(fresh[sample], expected[sample])
    assert same(pickle.loads(pickle.dumps(fresh))[late], expected[late])
    assert not same(build_datasets(config(tmp_path / "a"), VOCAB, 2).train[0], expected[0])


def test_a_small_corpus_has_the_same_rows_without_files_as_with_them(tmp_path, monkeypatch):
    write_proteins(tmp_path / "a", np.random.default_rng(1).integers(1, 90, 200))
    without = build_datasets(config(tmp_path / "a"), VOCAB, 1).train
    assert not (tmp_path / "row_index").exists()
    monkeypatch.setattr("megatron.data.rows.dataset.IN_MEMORY_DOCUMENTS", 199)
    with_files = build_datasets(config(tmp_path / "a"), VOCAB, 1).train
    assert all(same(without[sample], with_files[sample]) for sample in (0, 5000, 77, 999))
    assert list((tmp_path / "row_index").glob("*.counts"))


def test_going_on_in_a_later_epoch_packs_no_earlier_one(tmp_path, monkeypatch):
    write_proteins(tmp_path / "a", np.random.default_rng(1).integers(1, 90, 200))
    monkeypatch.setattr("megatron.data.rows.dataset.IN_MEMORY_DOCUMENTS", -1)
    before = build_datasets(config(tmp_path / "a"), VOCAB, 1).train
    expected, told = before[5000], before.describe()
    monkeypatch.setattr(PackedDataset, "_pack", lambda dataset, epoch: pytest.fail(f"packed epoch {epoch}"))
    for path in (tmp_path / "row_index").glob("*-train-*-000000.rows"):
        path.unlink()
    after = build_datasets(config(tmp_path / "a"), VOCAB, 1).train
    assert same(after[5000], expected) and after.describe() == told


def test_a_row_thousands_of_epochs_away_is_there_at_once(tmp_path):
    write_proteins(tmp_path / "a", [10, 20, 5, 7])
    train = build_datasets(config(tmp_path / "a"), VOCAB, 1).train
    began_s = time.process_time()
    assert isinstance(train, PackedDataset)
    assert train.locate(10_000) == (10_000, 0) and len(train[10_000].lengths) == 4
    assert time.process_time() - began_s < 5


def test_paths_need_not_be_utf8(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron.data.rows.dataset.IN_MEMORY_DOCUMENTS", 0)
    prefix = tmp_path / os.fsdecode(b"prot\xe9ines")
    write_proteins(prefix, [10, 20, 5, 7])
    clusters = tmp_path / os.fsdecode(b"clust\xe9rs")
    clusters.write_text("0\t1\n")
    data = config(prefix, split="3,1", blend_by="cluster", cluster_file=str(clusters))
    first, again = (build_datasets(data, VOCAB, 1).train for _ in range(2))
    assert same(first[3], again[3]) and first.describe() == again.describe()


def test_evaluation_rows_and_masks_are_the_same_whatever_training_uses(tmp_path):
    write_proteins(tmp_path / "a", np.random.default_rng(1).integers(1, 90, 200))
    one, other = (build_datasets(config(tmp_path / "a", split="6,2,2", **flags), VOCAB, seed) for seed, flags in
                  ((1, {}), (2, {"mask_prob": (0.5,), "mask_token_prob": 0.1, "mask_span_length": 5.0})))
    for a, b in ((one.valid, other.valid), (one.test, other.test)):
        assert a is not None and b is not None
        rows = a.num_epoch_rows(0)
        assert all(same(a[row], b[row]) and same(a[row], a[row + rows]) for row in range(rows))
    assert len(one.train[0].target_ids_m) == round(0.15 * (len(one.train[0].tokens_t) - len(one.train[0].lengths)))


def test_a_long_protein_is_cropped_to_a_new_window_each_epoch(tmp_path):
    protein, = write_proteins(tmp_path / "a", [500])
    train = build_datasets(config(tmp_path / "a"), VOCAB, 1).train
    windows = {originals(train[epoch])[0] for epoch in range(20)}
    assert len(windows) > 15 and {len(window) for window in windows} == {63}
    text = bytes(protein.astype(np.uint8))
    assert all(bytes(window) in text for window in windows)
    assert "1 longer than a row, cropped" in train.describe()


def test_every_window_of_a_long_protein_is_drawn_at_some_time(tmp_path):
    write_indexed(tmp_path / "a", [np.arange(6, 12)])
    train = build_datasets(config(tmp_path / "a", seq_length=5), VOCAB, 1).train
    assert {originals(train[epoch])[0][0] for epoch in range(40)} == {6, 7, 8}


def test_the_rows_of_a_seed_are_frozen_so_that_a_run_goes_on_with_those_it_has_not_seen(tmp_path):
    """Members of clusters, order, crops and masks: a resumed run may have been begun by an earlier version."""
    write_indexed(tmp_path / "a", [np.arange(6, 6 + length) for length in (9, 20, 3, 5)])
    (tmp_path / "clusters.tsv").write_text("0\t1\n0\t2\n")
    data = config(tmp_path / "a", seq_length=8, blend_by="cluster", cluster_file=str(tmp_path / "clusters.tsv"),
                  mask_prob=(0.3,))
    train = build_datasets(data, VOCAB, 1).train
    assert [[row.tokens_t.tolist() for row in epoch_rows(train, epoch)] for epoch in range(3)] == [
        [[2, 6, 1, 8], [2, 6, 7, 30, 9, 10]], [[2, 11, 12, 13, 14, 1, 16, 20], [2, 6, 7, 1, 9, 1]],
        [[2, 6, 7, 8, 1, 1], [2, 6, 1, 8]]]


def test_a_long_protein_is_split_into_consecutive_pieces(tmp_path):
    proteins = write_proteins(tmp_path / "a", [500, 10, 63, 64, 126, 127])
    train = build_datasets(config(tmp_path / "a", long_proteins="split"), VOCAB, 1).train
    expected = sorted(tuple(protein[start:start + 63]) for protein in proteins for start in range(0, len(protein), 63))
    for epoch in (0, 1):
        assert sorted(piece for row in epoch_rows(train, epoch) for piece in originals(row)) == expected
    assert "4 longer than a row, split" in train.describe()


def test_a_long_protein_is_dropped_and_counted(tmp_path):
    proteins = write_proteins(tmp_path / "a", [500, 10, 63, 64, 0])
    train = build_datasets(config(tmp_path / "a", long_proteins="drop"), VOCAB, 1).train
    assert sorted(piece for row in epoch_rows(train) for piece in originals(row)) == sorted(
        tuple(proteins[i]) for i in (1, 2))
    assert "2 longer than a row, dropped; 1 empty" in train.describe()


@pytest.mark.parametrize("long_proteins", ["crop", "split"])
def test_a_document_of_several_sequences_is_their_concatenation(tmp_path, long_proteins):
    with IndexedWriter(tmp_path / "a") as writer:
        writer.add(np.arange(6, 26), np.array([3, 5, 2, 10], np.int32), np.array([2, 0, 1, 1], np.int32))
    train = build_datasets(config(tmp_path / "a", long_proteins=long_proteins), VOCAB, 1).train
    pieces = sorted(piece for row in epoch_rows(train) for piece in originals(row))
    assert pieces == [tuple(range(6, 14)), (14, 15), tuple(range(16, 26))]
    assert train.residue_counts().tolist() == [0] * 6 + [1] * 20 + [0] * 5


def test_letters_are_counted_over_the_whole_split(tmp_path):
    proteins = write_proteins(tmp_path / "a", np.random.default_rng(1).integers(1, 90, 100))
    splits = build_datasets(config(tmp_path / "a", split="60,40"), VOCAB, 1)
    expected = np.bincount(np.concatenate(proteins[60:]), minlength=VOCAB.size)
    assert splits.valid is not None
    np.testing.assert_array_equal(splits.valid.residue_counts(), expected)
    assert splits.test is None


@pytest.fixture
def unsampled(monkeypatch):
    """The sample of the ids that is looked at before training misses what is wrong with them."""
    monkeypatch.setattr("megatron.data.rows.dataset.corpus_vocabulary", lambda data: VOCAB)


@pytest.mark.usefixtures("unsampled")
def test_ids_outside_the_vocabulary_are_an_error_that_names_the_document(tmp_path):
    write_indexed(tmp_path / "a", [np.array([6, 7]), np.array([6, 31])])
    train = build_datasets(config(tmp_path / "a"), VOCAB, 1).train
    with pytest.raises(DataError, match="a.bin: document 1 holds ids 6 to 31, but the vocabulary of .* has 31"):
        train[0]


def test_a_corpus_without_a_usable_protein_is_an_error(tmp_path):
    write_proteins(tmp_path / "a", [0, 100])
    with pytest.raises(DataError, match="hold no protein for a row of 64 positions"):
        build_datasets(config(tmp_path / "a", long_proteins="drop"), VOCAB, 1)


def test_missing_flags_are_named():
    with pytest.raises(ConfigError, match="--seq-length is missing"):
        build_datasets(DataConfig(), VOCAB, 1)
    with pytest.raises(ConfigError, match="--data-path is missing"):
        build_datasets(DataConfig(seq_length=8), VOCAB, 1)


@pytest.mark.usefixtures("unsampled")
def test_a_bin_past_2_to_31_tokens_is_read_to_its_end(tmp_path):
    length, count = 2**20, 2**11 + 2
    with open(tmp_path / "a.bin", "wb") as file:  # sparse: [PAD], which is no residue, up to the last protein's end
        file.truncate(2 * length * count)
        file.seek(2 * (length * count - 5))
        file.write(np.array([6, 7, 8, 9, 10], np.uint16).tobytes())
    with open(tmp_path / "a.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, count, count + 1))
        for array in (np.full(count, length, np.int32), np.arange(count) * 2 * length, np.arange(count + 1)):
            file.write(array.tobytes())
    train = build_datasets(config(tmp_path / "a", seq_length=length + 1, split="1"), VOCAB, 1).train
    assert isinstance(train, PackedDataset)
    row = int(np.flatnonzero(train.rows(0).pieces == count - 1)[0])  # one protein a row
    assert train.num_epoch_rows(0) == count
    assert originals(train[row])[0][-7:] == (0, 0, 6, 7, 8, 9, 10)


def test_an_evaluation_is_known_by_its_proteins_and_of_a_part_of_the_rows_by_their_packing(tmp_path):
    lengths = np.random.default_rng(1).integers(1, 64, 300)
    for name, seed in (("a", 0), ("moved", 0), ("b", 1)):
        write_proteins(tmp_path / name, lengths, seed)

    def of(name="a", num_rows=10**9, **flags):
        data = config(tmp_path / name, **{"split": "5,4,1"} | flags)
        return measured_on(build_datasets(data, VOCAB, 1).valid, num_rows)

    all_rows, some_rows = of(), of(num_rows=3)
    assert of("moved") == of(seq_length=128) == of(packing="sequential") == of(protein_ends="both") == all_rows
    assert of("moved", 3) == some_rows
    others = [of("b"), of(split="4,5,1"), some_rows, of("b", 3), of(num_rows=4), of(num_rows=3, seq_length=128),
              of(num_rows=3, packing="sequential"), of(num_rows=3, protein_ends="both")]
    assert len({all_rows, *others}) == 1 + len(others)
