"""Blends of corpora keep their proportions at every point, and any sample is found at once."""

import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config import DataConfig
from megatron.data.corpus.vocab import Vocab
from megatron.data.rows.blend import BlendedDataset, place_in_blend
from megatron.data.rows.data_path import parse_data_path
from megatron.data.rows.dataset import build_datasets, corpora_of
from megatron.errors import ConfigError
from tests.indexed_files import write_indexed

VOCAB = Vocab.from_file()


@settings(deadline=None)
@given(st.lists(st.fractions(Fraction(1, 100), 10), min_size=1, max_size=5), st.integers(1, 80))
def test_every_corpus_is_read_in_order_and_in_proportion(weights, num_samples):
    taken = [0] * len(weights)
    for sample in range(num_samples):
        corpus, index = place_in_blend(weights, sample)
        assert index == taken[corpus]
        taken[corpus] += 1
        shares = [weight / sum(weights) * (sample + 1) for weight in weights]
        assert all(abs(count - share) <= 2 for count, share in zip(taken, shares, strict=True))


def test_a_sample_far_into_the_blend_is_exact():
    weights = parse_data_path(["0.3", "a", "0.7", "b"])[0]
    assert place_in_blend(weights, 10**18 + 2) == (1, 7 * 10**17 + 1)


def test_a_blend_serves_rows_of_its_corpora(tmp_path):
    for name, residue in (("a", 6), ("b", 7)):
        write_indexed(tmp_path / name, [np.full(20, residue)] * 50)
    data = DataConfig(data_path=("3", str(tmp_path / "a"), "1", str(tmp_path / "b")), seq_length=64, split="8,2")
    splits = build_datasets(data, VOCAB, 1)
    from_a = [bool((splits.train[sample].target_ids_m == 6).all()) for sample in range(400)]
    assert sum(from_a) == 300
    assert splits.train.seq_length == 64
    assert splits.valid is not None and splits.valid.num_epoch_rows(0) == 8
    assert splits.test is None
    assert splits.train.describe().count("train") == 2


def test_the_letters_of_a_blend_count_by_weight_whatever_its_corpora_hold(tmp_path):
    for name, residue, count in (("a", 6, 50), ("b", 7, 500)):
        write_indexed(tmp_path / name, [np.full(20, residue)] * count)
    data = DataConfig(data_path=("3", str(tmp_path / "a"), "1", str(tmp_path / "b")), seq_length=64, split="1")
    counts = build_datasets(data, VOCAB, 1).train.residue_counts()
    assert counts[6] / counts.sum() == pytest.approx(0.75, abs=0.01)


def test_a_course_of_masking_counts_the_rows_of_the_run_not_of_the_corpus(tmp_path):
    for name in "ab":
        write_indexed(tmp_path / name, [np.full(100, 6)] * 50)
    data = DataConfig(data_path=("1", str(tmp_path / "a"), "1", str(tmp_path / "b")), seq_length=101, split="1,0,0",
                      mask_prob=(0.1, 0.5, 40.0))
    train = build_datasets(data, VOCAB, 1).train
    assert [len(train[sample].target_ids_m) for sample in (0, 1, 20, 39, 40, 90)] == [10, 11, 30, 49, 50, 50]


def test_a_corpus_goes_by_the_last_part_of_its_prefix_or_by_all_of_it_where_two_share_that(tmp_path):
    prefixes = [str(tmp_path / name) for name in ("one/a", "two/a", "two/b")]
    for prefix in prefixes:
        Path(prefix).parent.mkdir(exist_ok=True)
        write_indexed(prefix, [np.full(20, 6)] * 50)
    paths = tuple(word for prefix in [*prefixes, prefixes[0]] for word in ("1", prefix))
    blend = build_datasets(DataConfig(data_path=paths, seq_length=64), VOCAB, 1).train
    assert list(corpora_of(blend)) == [prefixes[0], prefixes[1], "b"]
    alone = build_datasets(DataConfig(data_path=(prefixes[0],), seq_length=64), VOCAB, 1).train
    assert corpora_of(alone) == {"a": alone}


def test_a_pass_of_evaluation_sees_every_row_of_every_corpus_once_and_them_evenly(tmp_path):
    for name, residue, count in (("few", 6, 5), ("many", 7, 400)):
        write_indexed(tmp_path / name, [np.full(20, residue)] * count)
    data = DataConfig(data_path=("0.9", str(tmp_path / "few"), "0.1", str(tmp_path / "many")), seq_length=21,
                      split="60,20,20")
    for part in (splits := build_datasets(data, VOCAB, 1)).valid, splits.test:
        assert isinstance(part, BlendedDataset)
        sizes = [dataset.num_epoch_rows(0) for dataset in part.datasets]
        seen = [place_in_blend(part.weights, row) for row in range(part.num_epoch_rows(0))]
        assert sizes == [1, 80] and len(set(seen)) == len(seen) == 81
        assert 0 in {corpus for corpus, _ in seen[20:60]}  # the few lie among the many


def test_a_blend_of_hundreds_of_corpora_holds_no_file_open(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron.data.rows.dataset.IN_MEMORY_DOCUMENTS", 0)
    write_indexed(tmp_path / "a", [np.full(20, 6)] * 20)
    before = len(os.listdir("/dev/fd"))
    splits = build_datasets(DataConfig(data_path=("1", str(tmp_path / "a")) * 100, seq_length=64, split="8,1,1"), VOCAB,
                            1)
    rows = [splits.train[sample] for sample in range(100)]
    assert len(rows) == 100 and len(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize("path, message", [
    (("1", "a", "2"), "has 3 parts"), (("1", "a", "b", "c"), "b is not a weight"),
    (("0", "a", "1", "b"), "0 is not a weight")])
def test_a_malformed_data_path_is_an_error(path, message):
    with pytest.raises(ConfigError, match=message):
        parse_data_path(path)
