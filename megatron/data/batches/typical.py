"""Makes an artificial micro-batch of typical size, full rows of equal proteins, for estimates and dry runs."""

import numpy as np

from megatron.config import DataConfig
from megatron.data.batches.batch import Batch, BatchShape, collate
from megatron.data.rows.packed import Row

PROTEIN_TOKENS = 300  # the mean of a corpus is 200 to 400 residues


def typical_lengths(seq_length: int, num_ends: int) -> list[int]:
    """The number of tokens of each protein in a full row: PROTEIN_TOKENS each, and a shorter one that fills the row.

    If the rest is too short even for a protein's special tokens, the last protein is longer instead.
    """
    whole, rest = divmod(seq_length, PROTEIN_TOKENS)
    if rest >= num_ends:
        return [PROTEIN_TOKENS] * whole + [rest]
    return [PROTEIN_TOKENS] * (whole - 1) + [PROTEIN_TOKENS + rest]


def typical_batch(data: DataConfig, num_rows: int, token_multiple: int = 1, share: int = 0,
                  num_shares: int = 1) -> Batch:
    """A micro-batch of `num_rows` such rows with evenly spaced targets; the other arguments are as in `batch_shape`."""
    lengths = typical_lengths(data.seq_length, data.num_ends)
    num_targets = max(1, round(max(data.mask_prob[:2]) * (data.seq_length - data.num_ends * len(lengths))))
    positions = np.linspace(1, data.seq_length - data.num_ends, num_targets).astype(np.int64)
    row = Row(np.zeros(data.seq_length, np.int64), np.array(lengths), positions, np.zeros(num_targets, np.int64))
    num_tokens = num_rows * data.seq_length
    shape = BatchShape(num_tokens + -num_tokens % token_multiple, num_rows * len(lengths), num_rows * num_targets,
                       max(lengths), share, num_shares, data.num_ends)
    return collate([row] * num_rows, shape)
