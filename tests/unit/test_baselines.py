"""The letter-frequency baselines agree with their definition, by simulation."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from megatron.data.corpus.vocab import Vocab
from megatron.data.rows.baselines import frequency_baselines
from megatron.data.rows.masking import Masking

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "proteins_demo"


def counts(**letters):
    vocab = Vocab.from_file()
    result = np.zeros(vocab.size, dtype=np.int64)
    for letter, count in letters.items():
        result[vocab.ids[letter]] = count
    return result


def baselines(train, valid):
    return frequency_baselines(train, valid, Vocab.from_file().residue_ids, Masking())


def test_letter_frequencies_cost_their_cross_entropy():
    assert baselines(counts(A=3, C=1), counts(A=1, C=1)).letters == pytest.approx(-(np.log(0.75) + np.log(0.25)) / 2)


def test_a_letter_that_training_never_showed_counts_as_seen_once():
    assert baselines(counts(A=99), counts(A=1, W=1)).letters == pytest.approx(-(np.log(0.99) + np.log(0.01)) / 2)


def test_a_split_without_a_residue_has_no_baseline():
    assert baselines(counts(A=3), counts()) is None


def test_the_visible_baseline_is_what_the_best_guesser_gets_on_masked_letters():
    ids = Vocab.from_file().residue_ids
    shares = np.random.default_rng(0).dirichlet(np.ones(len(ids)))
    whole = np.zeros(Vocab.from_file().size, dtype=np.int64)
    whole[ids] = np.rint(shares * 1e9)
    rng = np.random.default_rng(1)
    true = rng.choice(len(ids), 400_000, p=shares)
    kind = rng.choice(3, len(true), p=[0.8, 0.1, 0.1])  # [MASK], kept, random
    shown = np.where(kind == 1, true, rng.integers(len(ids), size=len(true)))
    posterior = np.where(shown == true, 0.1 * shares[true], 0) + 0.1 / len(ids) * shares[true]
    posterior /= 0.1 * shares[shown] + 0.1 / len(ids)
    losses = -np.log(np.where(kind == 0, shares[true], posterior))
    assert baselines(whole, whole).visible == pytest.approx(losses.mean(), abs=4 * losses.std() / len(true)**0.5)


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the folder shared/ beside the checkout")
def test_the_baseline_of_the_demo_proteins_is_the_known_one():
    found = []
    for name in ("train", "valid"):
        with gzip.open(DATA / f"{name}.fasta.gz", "rt") as file:
            letters = "".join(line.strip() for line in file if not line.startswith(">"))
        found.append(counts(**{letter: letters.count(letter) for letter in set(letters)}))
    assert baselines(*found).letters == pytest.approx(2.8956, abs=5e-5)
