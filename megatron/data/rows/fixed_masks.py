"""Masks for evaluation, which depend only on a protein's own letters.

Corpus, packing, row length, vocabulary and training masks have no influence: two runs that evaluate a protein predict
the same residues of it from the same others, as far as these are in the same row.
"""

import hashlib

import numpy as np

from megatron.data.corpus.vocab import RESIDUE_LETTERS, Vocab
from megatron.data.rows.masking import Masking
from megatron.data.rows.packing import order_hashes

FIXED = Masking()  # the defaults, 15 %, 80/10/10, single residues, whatever training uses
_DEVIATIONS = 4


class FixedMasks:
    """Masks proteins given as ids of one vocabulary."""

    def __init__(self, vocab: Vocab) -> None:
        known = [letter for letter in RESIDUE_LETTERS if letter in vocab.ids]
        self._mask_id, self._residue_ids = vocab.mask_id, np.array([vocab.ids[letter] for letter in known])
        self._letters = np.zeros(vocab.size, np.uint8)  # by id; 0 for tokens that are no residue
        self._letters[self._residue_ids] = [ord(letter) for letter in known]

    def letters(self, ids: np.ndarray) -> np.ndarray:
        """The residues as ASCII codes, uint8; 0 for tokens that are no residue."""
        return self._letters[ids]

    def mask(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A masked copy of a whole protein (without special tokens), and which of its tokens are targets (bool).

        Random numbers are SplitMix64 hashes whose key is a digest of the letters. Targets are the residues with the
        smallest hashes; their number is FIXED.prob times the residues, rounded at random to be right on average.
        """
        letters = self.letters(ids)
        residues = np.flatnonzero(letters)
        key = int.from_bytes(hashlib.blake2b(letters.tobytes(), digest_size=8).digest(), "little")
        hashes = order_hashes(key, 2 * len(residues) + 1)
        becomes, order, rounding = np.split(hashes, [len(residues), 2 * len(residues)])
        num_chosen = int(FIXED.prob * len(residues) + _uniform(rounding)[0])
        chosen = np.sort(np.argsort(order)[:num_chosen])
        draw = (_uniform(becomes[chosen]) - FIXED.mask_token_prob) / FIXED.random_prob  # <0 mask, <1 random, else kept
        masked, is_target = ids.copy(), np.zeros(len(ids), bool)
        is_target[residues[chosen]] = True
        masked[residues[chosen[draw < 0]]] = self._mask_id
        is_random = (draw >= 0) & (draw < 1)
        drawn = (draw[is_random] * len(self._residue_ids)).astype(np.int64)
        masked[residues[chosen[is_random]]] = self._residue_ids[drawn]
        return masked, is_target


def most_fixed_targets(num_residues: int) -> int:
    """A number of targets that proteins with `num_residues` in total rarely exceed: the mean plus 4 deviations."""
    mean = FIXED.prob * num_residues
    return min(num_residues, round(mean + _DEVIATIONS * (mean * (1 - FIXED.prob)) ** 0.5) + 1)


def _uniform(hashes: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1), made of the upper 53 bits of the hashes."""
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53
