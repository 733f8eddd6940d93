"""A made-up micro-batch of typical size, for estimates and dry runs that have no data: full rows of equal proteins."""

import numpy as np
import torch

from megatron.config import DataConfig
from megatron.data.batches.batch import Batch

PROTEIN_TOKENS = 300  # a mean protein has 200 to 400 residues


def typical_lengths(seq_length: int, num_rows: int) -> tuple[int, ...]:
    """Tokens of each protein in `num_rows` full rows; in each row the last is the shorter one that fills it."""
    whole, rest = divmod(seq_length, PROTEIN_TOKENS)
    return (*[PROTEIN_TOKENS] * whole, *([rest] if rest else [])) * num_rows


def typical_targets(data: DataConfig, num_rows: int) -> np.ndarray:
    """Positions [m] of the tokens chosen for prediction, evenly spread over the `num_rows` rows."""
    num_tokens, num_proteins = num_rows * data.seq_length, len(typical_lengths(data.seq_length, num_rows))
    num_targets = max(1, round(data.mask_prob * (num_tokens - num_proteins)))
    return np.linspace(1, num_tokens - 1, num_targets).astype(np.int64)


def typical_batch(data: DataConfig, num_rows: int) -> Batch:
    """The micro-batch of `num_rows` such rows."""
    lengths = typical_lengths(data.seq_length, num_rows)
    starts = np.cumsum([0, *lengths])
    num_tokens, targets = int(starts[-1]), typical_targets(data, num_rows)
    return Batch(
        tokens_t=torch.zeros(num_tokens, dtype=torch.int64),
        positions_t=torch.from_numpy(np.arange(num_tokens) - np.repeat(starts[:-1], lengths)),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)), target_positions_m=torch.from_numpy(targets),
        target_ids_m=torch.zeros(len(targets), dtype=torch.int64), lengths=lengths,
        num_residues=num_tokens - len(lengths), num_positions=num_tokens)
