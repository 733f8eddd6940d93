"""Masking: how many residues, which ones, and what replaces them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config import DataConfig
from megatron.data.corpus.vocab import Vocab
from megatron.data.rows.masking import Masker, Masking
from megatron.errors import ConfigError

VOCAB = Vocab.from_file()
SPECIAL = sorted(set(range(VOCAB.size)) - set(VOCAB.residue_ids.tolist()))


def row_of(lengths: list[int], rng: np.random.Generator, ids: np.ndarray | None = None) -> np.ndarray:
    choices = VOCAB.residue_ids if ids is None else ids
    tokens = [np.concatenate([[VOCAB.cls_id], rng.choice(choices, length - 1)]) for length in lengths]
    return np.concatenate(tokens).astype(np.int64)


@settings(deadline=None)
@given(st.lists(st.integers(2, 60), min_size=1, max_size=12), st.sampled_from([1.0, 3.0, 10.0]),
       st.floats(0.01, 0.9), st.integers(0, 2**32))
def test_no_special_token_is_ever_chosen_or_placed(lengths, span_length, prob, seed):
    rng = np.random.default_rng(seed)
    tokens = row_of(lengths, rng, np.arange(VOCAB.size))
    masker = Masker(Masking(prob, 0.5, 0.4, span_length), VOCAB)
    masked, positions, ids = masker.mask(tokens, np.array(lengths), rng)
    assert np.isin(ids, VOCAB.residue_ids).all()
    assert np.isin(masked[positions], [*VOCAB.residue_ids, VOCAB.mask_id]).all()
    np.testing.assert_array_equal(tokens[positions], ids)
    untouched = np.delete(np.arange(len(tokens)), positions)
    np.testing.assert_array_equal(masked[untouched], tokens[untouched])
    assert np.all(np.diff(positions) > 0)
    num_residues = np.isin(tokens, VOCAB.residue_ids).sum()
    assert len(positions) == min(num_residues, max(1, round(prob * num_residues)))


@pytest.mark.parametrize("span_length", [1.0, 4.0])
def test_shares_are_15_percent_and_80_10_10(span_length):
    rng = np.random.default_rng(0)
    lengths = np.full(100, 401)
    tokens = row_of(lengths.tolist(), rng)
    masked, positions, ids = Masker(Masking(span_length=span_length), VOCAB).mask(tokens, lengths, rng)
    assert len(positions) == 6000
    became = masked[positions]
    assert np.mean(became == VOCAB.mask_id) == pytest.approx(0.8, abs=0.02)
    changed = (became != VOCAB.mask_id) & (became != ids)
    assert changed.mean() == pytest.approx(0.1 * 24 / 25, abs=0.015)
    drawn = np.bincount(became[changed], minlength=VOCAB.size)[VOCAB.residue_ids]
    assert drawn.min() > 5  # every residue is drawn: 23 expected


def test_shares_of_masks_and_of_random_letters_are_those_that_flags_give():
    rng = np.random.default_rng(0)
    tokens = row_of([60_001], rng)
    masked, positions, ids = Masker(Masking(0.5, 0.5, 0.1), VOCAB).mask(tokens, np.array([60_001]), rng)
    became = masked[positions]
    assert np.mean(became == VOCAB.mask_id) == pytest.approx(0.5, abs=0.01)
    assert np.mean((became != VOCAB.mask_id) & (became != ids)) == pytest.approx(0.1 * 24 / 25, abs=0.01)


def test_every_residue_is_chosen_equally_often():
    tokens = row_of([21, 21], np.random.default_rng(0))
    masker = Masker(Masking(prob=0.25), VOCAB)
    chosen = np.zeros(42)
    for seed in range(800):
        chosen[masker.mask(tokens, np.array([21, 21]), np.random.default_rng(seed))[1]] += 1
    assert chosen[[0, 21]].sum() == 0
    assert np.delete(chosen, [0, 21]).min() > 200 - 5 * np.sqrt(150)
    assert np.delete(chosen, [0, 21]).max() < 200 + 5 * np.sqrt(150)


def test_spans_are_as_long_as_asked_and_end_with_their_protein():
    rng = np.random.default_rng(1)
    lengths = np.full(1000, 501)
    tokens, ends = row_of(lengths.tolist(), rng), np.cumsum(lengths)
    positions = Masker(Masking(prob=0.01, span_length=8.0), VOCAB).mask(tokens, lengths, rng)[1]
    num_spans = 1 + np.count_nonzero(np.diff(positions) > 1)
    assert len(positions) / num_spans == pytest.approx(8.0, rel=0.08)
    assert np.isin(ends - 1, positions).any() and not np.isin(ends - 501, positions).any()


def test_one_residue_is_chosen_in_a_row_too_short_for_a_share():
    masked, positions, _ = Masker(Masking(), VOCAB).mask(np.array([VOCAB.cls_id, 6]), np.array([2]),
                                                         np.random.default_rng(0))
    assert positions.tolist() == [1] and masked[0] == VOCAB.cls_id


@pytest.mark.parametrize("span_length", [1.0, 5.0])
def test_a_row_without_residues_has_no_targets(span_length):
    tokens = np.array([VOCAB.cls_id, VOCAB.unk_id])
    masked, positions, ids = Masker(Masking(span_length=span_length), VOCAB).mask(tokens, np.array([2]),
                                                                                  np.random.default_rng(0))
    assert masked.tolist() == tokens.tolist() and len(positions) == len(ids) == 0


def test_the_share_goes_evenly_from_one_to_another_over_so_many_rows_of_the_run():
    masking = Masking.from_config(DataConfig(mask_prob=(0.3, 0.1, 200.0)))
    masker, lengths = Masker(masking, VOCAB), np.array([101])
    tokens = row_of([101], np.random.default_rng(0))
    chosen = [len(masker.mask(tokens, lengths, np.random.default_rng(1), sample)[1])
              for sample in (0, 100, 150, 200, 999)]
    assert chosen == [30, 20, 15, 10, 10]


@pytest.mark.parametrize("ramp", [(0.1, 0.5, 10.0), (0.5, 0.1, 10.0)])
def test_the_most_targets_are_those_of_the_highest_share_of_a_ramp(ramp):
    assert Masker(Masking.from_config(DataConfig(mask_prob=ramp)), VOCAB).most_chosen(100) == 50


@pytest.mark.parametrize("share", [(1.2,), (0.3, 0.2), (0.3, 1.0, 5.0), (0.1, 0.2, 3.0, 4.0)])
def test_a_share_or_a_course_that_is_none_is_refused(share):
    with pytest.raises(ConfigError, match="--mask-prob is .*; give a share between 0 and 1, or START END SAMPLES"):
        Masking.from_config(DataConfig(mask_prob=share))
