"""Blends several corpora in proportion to weights.

Megatron gives each sample to the corpus that is furthest behind its weight, which depends on all samples before. Here
the first corpus takes evenly spaced samples, the second evenly spaced ones of the rest, and so on. That is just as
even, and the corpus of any sample follows from a formula: no index is stored, and resuming costs nothing.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np

from megatron.data.rows.packed import COUNTED_RESIDUES, PackedDataset, Row

DESCRIBED_CORPORA = 4


class BlendedDataset:
    """An infinite sequence of rows from several corpora; each corpus's rows come in its own order."""

    def __init__(self, datasets: Sequence[PackedDataset], weights: Sequence[int] | Sequence[Fraction]) -> None:
        self.datasets = tuple(datasets)
        denominator = lcm(*(weight.denominator for weight in weights))
        self.weights = [int(weight * denominator) for weight in weights]

    def __getitem__(self, sample: int) -> Row:
        corpus, index = place_in_blend(self.weights, sample)
        return self.datasets[corpus].row(index, sample)

    @property
    def seq_length(self) -> int:
        """The positions of a row."""
        return self.datasets[0].seq_length

    @property
    def num_ends(self) -> int:
        """The special tokens of each protein: 1 before it, or 2, before and after it."""
        return self.datasets[0].num_ends

    def build_ahead(self) -> None:
        """From now on, pack each corpus's next epoch in a thread while the current one is in use."""
        for dataset in self.datasets:
            dataset.build_ahead()

    def num_epoch_rows(self, epoch: int) -> int:
        """The number of rows of all corpora together in epoch `epoch` of each; for evaluation, one pass."""
        return sum(dataset.num_epoch_rows(epoch) for dataset in self.datasets)

    def most_proteins(self, num_rows: int, sample: int = 0) -> int:
        """The largest number of proteins in `num_rows` rows from any corpus, in the epochs around `sample`."""
        nearest = (sample * weight // sum(self.weights) for weight in self.weights)
        return num_rows * max(part.most_proteins(1, own) for part, own in zip(self.datasets, nearest, strict=True))

    def most_targets(self, num_rows: int) -> int:
        """The largest number of targets in `num_rows` rows."""
        return max(dataset.most_targets(num_rows) for dataset in self.datasets)

    def longest(self) -> int:
        """The number of tokens of the longest protein in a row."""
        return max(dataset.longest() for dataset in self.datasets)

    def residue_counts(self) -> np.ndarray:
        """How often each id occurs in a sample of the data, int64 [vocabulary], with corpora in proportion to weights.
        """
        counts = [dataset.residue_counts(COUNTED_RESIDUES // len(self.datasets)) for dataset in self.datasets]
        total = sum(int(count.sum()) for count in counts)
        shares = [weight / sum(self.weights) * count / max(count.sum(), 1)
                  for weight, count in zip(self.weights, counts, strict=True)]
        return np.rint(np.sum(shares, axis=0) * total).astype(np.int64)

    def describe(self) -> str:
        """A text on each corpus for the log; for many corpora, on the first few and on all together."""
        text = "; ".join(dataset.describe() for dataset in self.datasets[:DESCRIBED_CORPORA])
        if len(self.datasets) > DESCRIBED_CORPORA:
            num_proteins = sum(len(dataset.documents) for dataset in self.datasets)
            text += (f"; … {len(self.datasets)} corpora: {num_proteins:,} proteins, {self.num_epoch_rows(0):,} rows an "
                     "epoch")
        return text


def place_in_blend(weights: Sequence[int], sample: int) -> tuple[int, int]:
    """The number of the corpus that a sample comes from, and its index there.

    Each corpus's indices run 0, 1, 2, … without a gap.
    """
    rest = sum(weights)
    for corpus, weight in enumerate(weights[:-1]):
        # Of the first s samples this corpus takes round(s * weight / rest), halves rounded up.
        index, remainder = divmod(2 * weight * sample + rest, 2 * rest)
        if remainder + 2 * weight >= 2 * rest:  # of the first s + 1 it takes one more
            return corpus, index
        sample -= index
        rest -= weight
    return len(weights) - 1, sample
