"""What the benchmarks run on: a row of 2,176 positions with proteins of the shipped ones' lengths, as they are packed.
"""

import numpy as np

from megatron.data.batches.batch import Batch, BatchShape, collate
from megatron.data.rows.packed import Row

LENGTHS = (109, 137, 261, 288, 292, 299, 338, 452)


def packed_row(seed: int = 0) -> Batch:
    """Random residues, every seventh of them a target."""
    tokens = np.random.default_rng(seed).integers(6, 31, sum(LENGTHS))
    targets = np.arange(1, len(tokens), 7)
    shape = BatchShape(len(tokens), num_proteins=len(LENGTHS), num_targets=len(targets), max_length=max(LENGTHS))
    return collate([Row(tokens, np.array(LENGTHS), targets, tokens[targets])], shape)
