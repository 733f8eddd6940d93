"""Writes small indexed datasets (.bin and .idx) of given token ids."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from megatron.data.corpus.indexed_writer import IndexedWriter


def write_indexed(prefix: str | Path, documents: Iterable[np.ndarray], impl: str = "mmap") -> None:
    """Write PREFIX.bin and .idx: one document for each array of ids, of one sequence, or of none if it is empty."""
    with IndexedWriter(prefix, impl) as writer:
        for ids in documents:
            sizes = np.array([len(ids)] if len(ids) else [], dtype=np.int32)
            writer.add(ids, sizes, np.array([len(sizes)], dtype=np.int32))
