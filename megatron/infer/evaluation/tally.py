"""Counts of predictions by letter, by position in the protein and by protein.

Shapes: v ids, n bins of positions, p proteins.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron.data.corpus.vocab import AMINO_ACIDS, Vocab
from megatron.data.rows.baselines import frequency_baselines
from megatron.data.rows.masking import Masking

FIRST_OF_BIN = np.array([1, 2, 11, 51, 101, 201, 401, 801])  # numbers of residues, from 1


def bin_names() -> list[str]:
    """The range of residue numbers of each bin, as text."""
    last = [*(FIRST_OF_BIN[1:] - 1), None]
    return [f"{first}+" if until is None else f"{first}" if first == until else f"{first}–{until}"
            for first, until in zip(FIRST_OF_BIN, last, strict=True)]


@dataclass
class TargetTally:
    """Sums over targets. The three rows of an array are the number of targets, their loss in nats, and the number
    predicted correctly.
    """

    by_letter_3v: np.ndarray
    by_position_3n: np.ndarray = field(default_factory=lambda: np.zeros((3, len(FIRST_OF_BIN))))
    of_proteins: list[tuple[int, float]] = field(default_factory=list)  # targets and their loss; p long

    def add(self, true_ids: np.ndarray, numbers: np.ndarray, losses: np.ndarray, is_right: np.ndarray) -> None:
        """Count the targets of one protein: true ids, residue numbers from 1, losses, and whether each is predicted
        correctly.
        """
        bins = np.searchsorted(FIRST_OF_BIN, numbers, side="right") - 1
        for counts, place in ((self.by_letter_3v, true_ids), (self.by_position_3n, bins)):
            for row, values in zip(counts, (np.ones(len(losses)), losses, is_right), strict=True):
                np.add.at(row, place, values)
        self.of_proteins.append((len(losses), float(losses.sum())))

    @classmethod
    def merged(cls, tallies: Sequence["TargetTally"]) -> "TargetTally":
        """The sum of the tallies of several ranks."""
        return cls(np.sum([each.by_letter_3v for each in tallies], 0),
                   np.sum([each.by_position_3n for each in tallies], 0),
                   [pair for each in tallies for pair in each.of_proteins])

    def report(self, vocab: Vocab, masking: Masking) -> dict[str, Any]:
        """The mean results, as JSON; None if there is no target. `masking`: how targets were chosen and shown.

        `standard_error`: of the loss, over the choice of proteins; None for a single one. `letters_alone`: the loss of
        knowing only the frequencies of the targets' letters. `letters_and_visible`: the loss of knowing also the
        letters that masking leaves visible; see `Baselines`.
        """
        number, loss, right = self.by_letter_3v.sum(1)
        if number == 0:
            return {"proteins": len(self.of_proteins), "targets": 0, "loss": None}
        counts, sums = np.array(self.of_proteins).T
        mean = loss / number
        deviation = np.sqrt(np.square(sums - mean * counts).sum())
        targets = self.by_letter_3v[0]
        letters = np.union1d(vocab.residue_ids, np.flatnonzero(targets))  # the unknown may be one of them
        baselines = frequency_baselines(targets, targets, letters, masking)
        assert baselines is not None  # there are targets
        return {"proteins": len(counts), "targets": int(number), "loss": mean,
                "standard_error": float(deviation / number) if len(counts) > 1 else None,
                "perplexity": float(np.exp(mean)), "accuracy": right / number,
                "letters_alone": baselines.letters, "letters_and_visible": baselines.visible,
                "by_letter": _means(self.by_letter_3v, vocab.tokens),
                "by_position": _means(self.by_position_3n, bin_names())}


def of_other_letters(report: Mapping[str, Any]) -> tuple[dict[str, int], float]:
    """The number of targets of each letter that is not one of the 20 amino acids, and the loss over all other targets.

    The loss is nan if there are no others.
    """
    by_letter: Mapping[str, Mapping[str, float]] = report["by_letter"]
    known = [facts for letter, facts in by_letter.items() if letter in AMINO_ACIDS]
    number = sum(facts["targets"] for facts in known)
    return ({letter: int(facts["targets"]) for letter, facts in by_letter.items() if letter not in AMINO_ACIDS},
            sum(facts["targets"] * facts["loss"] for facts in known) / number if number else math.nan)


def _means(counts: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, float]]:
    return {name: {"targets": int(number), "loss": float(loss / number), "accuracy": float(right / number)}
            for name, (number, loss, right) in zip(names, counts.T, strict=False) if number}
