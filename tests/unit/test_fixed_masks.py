"""The masks of evaluation depend on the protein alone, not on its neighbours in the row or on its place."""

import numpy as np
import pytest

from megatron.config import DataConfig
from megatron.data.corpus.vocab import Vocab
from megatron.data.rows.dataset import build_datasets
from megatron.data.rows.fixed_masks import FixedMasks, most_fixed_targets
from tests.indexed_files import write_indexed

VOCAB = Vocab.from_file()
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"


def targets_of(prefix, vocab=VOCAB, **flags):
    """Of each protein of an evaluation: its targets, as (residue, letter that stood there, letter now) in order."""
    data = DataConfig(data_path=(str(prefix),), **{"seq_length": 64, "split": "1,9,0", **flags})
    valid = build_datasets(data, vocab, 1).valid
    found, names = {}, {}
    for sample in range(valid.num_epoch_rows(0)):
        row, pieces = valid[sample], valid.rows(0).row(sample)
        starts = np.cumsum(row.lengths) - row.lengths
        for piece, start, length in zip(pieces.tolist(), starts, row.lengths, strict=True):
            document, offset = valid.pieces.locate(piece)
            here = (row.target_positions_m > start) & (row.target_positions_m < start + length)
            names |= {document: found.setdefault(document, [])}
            for position, was in zip(row.target_positions_m[here], row.target_ids_m[here], strict=True):
                found[document].append((int(offset + position - start - 1), vocab.tokens[was],
                                        vocab.tokens[row.tokens_t[position]].strip("[]<>").lower()))
    return {document: sorted(targets) for document, targets in found.items()}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    rng = np.random.default_rng(0)
    prefix = tmp_path_factory.mktemp("data") / "a"
    write_indexed(prefix, [rng.choice(VOCAB.residue_ids, length) for length in [*rng.integers(1, 150, 80), 3000]])
    return prefix


@pytest.mark.parametrize("flags", [
    {"seq_length": 300}, {"packing": "sequential"}, {"long_proteins": "drop"}, {"protein_ends": "both"},
    {"mask_prob": (0.3,), "mask_span_length": 4.0}, {"mask_prob": (0.3, 0.2, 50.0)}], ids=str)
def test_two_evaluations_predict_the_same_residues_from_the_same_letters_whatever_the_flags(prefix, flags):
    assert targets_of(prefix, **flags) == targets_of(prefix)


def test_the_targets_do_not_depend_on_how_a_vocabulary_numbers_letters(prefix):
    assert targets_of(prefix, Vocab.from_file("esm")) == targets_of(prefix)


def test_a_protein_has_its_masks_in_another_corpus_and_another_place(prefix, tmp_path):
    one = targets_of(prefix)
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 150, 80)
    proteins = [rng.choice(VOCAB.residue_ids, length) for length in lengths]
    write_indexed(tmp_path / "b", proteins[::-1])
    other = targets_of(tmp_path / "b", split="1,79,0")
    assert [other[79 - 1 - n] for n in range(8, 79)] == [one[n - 8] for n in range(8, 79)]


def test_fifteen_percent_are_chosen_of_which_80_10_10():
    rng, masks = np.random.default_rng(1), FixedMasks(VOCAB)
    counts = np.zeros(4)
    for length in rng.integers(1, 400, 1000):
        ids = rng.choice(VOCAB.residue_ids, length)
        masked, is_target = masks.mask(ids)
        assert abs(is_target.sum() - 0.15 * length) < 1
        np.testing.assert_array_equal(masked[~is_target], ids[~is_target])
        was, now = ids[is_target], masked[is_target]
        counts += [length, len(was), (now == VOCAB.mask_id).sum(), (now == was).sum()]
    residues, targets, hidden, kept = counts
    assert targets / residues == pytest.approx(0.15, abs=0.001)
    assert hidden / targets == pytest.approx(0.8, abs=0.01)
    assert kept / targets == pytest.approx(0.1 + 0.1 / len(VOCAB.residue_ids), abs=0.01)


def test_every_residue_and_every_letter_is_drawn_as_often():
    rng, masks = np.random.default_rng(2), FixedMasks(VOCAB)
    places, letters = np.zeros(40), np.zeros(VOCAB.size)
    for _ in range(4000):
        ids = rng.choice(VOCAB.residue_ids, 40)
        masked, is_target = masks.mask(ids)
        places += is_target
        letters += np.bincount(masked[is_target & (masked != VOCAB.mask_id) & (masked != ids)], minlength=VOCAB.size)
    assert abs(places - 600).max() < 5 * 510**0.5
    expected = 0.1 * 24000 / len(VOCAB.residue_ids) * 24 / 25
    assert abs(letters[VOCAB.residue_ids] - expected).max() < 5 * expected**0.5


def test_what_is_no_residue_is_never_a_target_nor_counted():
    ids = np.full(30, VOCAB.unk_id)
    ids[::3] = VOCAB.residue_ids[3]
    masked, is_target = FixedMasks(VOCAB).mask(ids)
    assert is_target.sum() in (1, 2) and not is_target[ids == VOCAB.unk_id].any()
    assert (masked[~is_target] == ids[~is_target]).all()


def test_the_masks_stay_what_they_are():
    ids = np.array([VOCAB.ids[letter] for letter in 3 * AMINO_ACIDS])
    masked, is_target = FixedMasks(VOCAB).mask(ids)
    assert {int(n): VOCAB.tokens[masked[n]] for n in np.flatnonzero(is_target)} == {
        27: "C"} | dict.fromkeys((3, 8, 15, 17, 40, 47, 49, 52), "[MASK]")


def test_few_micro_batches_have_more_targets_than_is_made_room_for():
    rng, masks = np.random.default_rng(3), FixedMasks(VOCAB)
    for _ in range(300):  # a piece of a long protein
        _, is_target = masks.mask(rng.choice(VOCAB.residue_ids, 600))
        assert is_target[:100].sum() <= most_fixed_targets(100) == 30
