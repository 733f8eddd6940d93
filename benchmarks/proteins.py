"""The batches that benchmarks run on: packed rows of proteins with the lengths of the shipped ones."""

import gzip
from functools import cache
from pathlib import Path

import numpy as np

from megatron.config import DataConfig
from megatron.data.batches.batch import Batch, BatchShape, collate
from megatron.data.rows.packed import Row
from megatron.data.rows.packing import order_key, pack

LENGTHS = (109, 137, 261, 288, 292, 299, 338, 452)
SHIPPED = Path(__file__).resolve().parents[1] / "examples" / "proteins" / "small.fasta.gz"


def packed_row(seed: int = 0) -> Batch:
    """A batch of one row of 2,176 positions: random residues, of which every seventh is a target."""
    tokens = np.random.default_rng(seed).integers(6, 31, sum(LENGTHS))
    targets = np.arange(1, len(tokens), 7)
    shape = BatchShape(len(tokens), num_proteins=len(LENGTHS), num_targets=len(targets), max_length=max(LENGTHS))
    return collate([Row(tokens, np.array(LENGTHS), targets, tokens[targets])], shape)


def shipped_rows(data: DataConfig, num_rows: int) -> Batch:
    """A micro-batch of shipped proteins (from Swiss-Prot), long ones cropped, with evenly spaced targets.

    Of all micro-batches of an epoch it is the one whose number of attended pairs is closest to the mean. Only the
    lengths are real; all token ids are 0.
    """
    residues = shipped_lengths()
    packed = pack(residues, data.seq_length, data.packing, key=order_key(0), num_ends=data.num_ends)
    tokens = np.minimum(residues + data.num_ends, data.seq_length)
    rows = [tokens[packed.row(index)] for index in range(len(packed))]
    batches = [rows[start:start + num_rows] for start in range(0, len(rows) - num_rows + 1, num_rows)]
    num_pairs = [sum(int((lengths**2).sum()) for lengths in batch) for batch in batches]
    chosen = batches[int(np.abs(np.array(num_pairs) - np.mean(num_pairs)).argmin())]
    most = data.seq_length - data.num_ends
    shape = BatchShape(num_rows * data.seq_length, sum(map(len, chosen)), num_rows * round(data.mask_prob[0] * most),
                       max(int(lengths.max()) for lengths in chosen), num_ends=data.num_ends)
    return collate([_row(lengths, data) for lengths in chosen], shape)


@cache
def shipped_lengths() -> np.ndarray:
    """The number of residues of each shipped protein."""
    records = gzip.decompress(SHIPPED.read_bytes()).decode().split(">")[1:]
    return np.array([sum(map(len, record.splitlines()[1:])) for record in records])


def _row(lengths: np.ndarray, data: DataConfig) -> Row:
    size = int(lengths.sum())
    num_targets = round(data.mask_prob[0] * (size - data.num_ends * len(lengths)))
    positions = np.linspace(1, size - data.num_ends, num_targets).astype(np.int64)
    return Row(np.zeros(size, np.int64), lengths, positions, np.zeros(num_targets, np.int64))
