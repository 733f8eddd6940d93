"""Several weighted corpora as one: sample i comes from the corpus that is due, in proportion to the weights.

Megatron hands each sample to the corpus that lags its weight the most, which needs the whole past. Here the first
corpus takes its evenly spaced share of the samples, the second its share of the rest, and so on: just as even, and any
sample's place is a formula, so no index is stored and resuming costs nothing.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np

from megatron.data.rows.packed import COUNTED_RESIDUES, PackedDataset, Row

DESCRIBED_CORPORA = 4


class BlendedDataset:
    """An infinite sequence of rows from several corpora; its rows are theirs, each corpus's in its own order."""

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
        """The tokens around each protein."""
        return self.datasets[0].num_ends

    def build_ahead(self) -> None:
        """From now on, builds in a thread the rows of each corpus's epoch after the one in use."""
        for dataset in self.datasets:
            dataset.build_ahead()

    def num_epoch_rows(self, epoch: int) -> int:
        """The rows of all corpora together in their epoch of that number; a pass over the blend, by its size."""
        return sum(dataset.num_epoch_rows(epoch) for dataset in self.datasets)

    def most_proteins(self, num_rows: int, sample: int = 0) -> int:
        """The most proteins in so many rows of any corpora, in their epochs that a sample is near."""
        nearest = (sample * weight // sum(self.weights) for weight in self.weights)
        return num_rows * max(part.most_proteins(1, own) for part, own in zip(self.datasets, nearest, strict=True))

    def most_targets(self, num_rows: int) -> int:
        """The most targets that so many rows have."""
        return max(dataset.most_targets(num_rows) for dataset in self.datasets)

    def longest(self) -> int:
        """The tokens of the longest protein in a row."""
        return max(dataset.longest() for dataset in self.datasets)

    def residue_counts(self) -> np.ndarray:
        """How often each id occurs, int64 [vocabulary], each corpus scaled to its weight in the blend."""
        counts = [dataset.residue_counts(COUNTED_RESIDUES // len(self.datasets)) for dataset in self.datasets]
        total = sum(int(count.sum()) for count in counts)
        shares = [weight / sum(self.weights) * count / max(count.sum(), 1)
                  for weight, count in zip(self.weights, counts, strict=True)]
        return np.rint(np.sum(shares, axis=0) * total).astype(np.int64)

    def describe(self) -> str:
        """What each corpus holds, one after the other; of many, the first ones and the sum of all."""
        text = "; ".join(dataset.describe() for dataset in self.datasets[:DESCRIBED_CORPORA])
        if len(self.datasets) > DESCRIBED_CORPORA:
            num_proteins = sum(len(dataset.documents) for dataset in self.datasets)
            text += (f"; … {len(self.datasets)} corpora: {num_proteins:,} proteins, {self.num_epoch_rows(0):,} rows an "
                     "epoch")
        return text


def place_in_blend(weights: Sequence[int], sample: int) -> tuple[int, int]:
    """The corpus of a sample and its index there; each corpus's indices run 0, 1, 2, … without a gap."""
    rest = sum(weights)
    for corpus, weight in enumerate(weights[:-1]):
        # Of s samples an evenly spaced share takes s * weight / rest, as the nearest whole number, halves up.
        index, remainder = divmod(2 * weight * sample + rest, 2 * rest)
        if remainder + 2 * weight >= 2 * rest:  # of s + 1 samples it takes one more
            return corpus, index
        sample -= index
        rest -= weight
    return len(weights) - 1, sample
