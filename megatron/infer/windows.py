"""Proteins that are longer than a window, as overlapping windows of it. Shapes: r residues of a protein."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class ProteinWindow:
    """The residues `start:stop` of a protein, of which `kept_start:kept_stop` are told from it: nowhere is more seen.
    """

    start: int
    stop: int
    kept_start: int
    kept_stop: int


def windows_of(length: int, size: int | None) -> list[ProteinWindow]:
    """Windows of `size` residues (None: as long as the protein), each half over the one before; the last ends with it.

    What two have in common is cut in its middle, so that a residue is told from where it has the most on each side.
    """
    if size is None or length <= size:
        return [ProteinWindow(0, length, 0, length)]
    starts = [*range(0, length - size, max(1, size // 2)), length - size]
    cuts = [0, *((start + before + size) // 2 for before, start in pairwise(starts)), length]
    return [ProteinWindow(start, start + size, *kept) for start, kept in zip(starts, pairwise(cuts), strict=True)]


def joined(parts: Sequence[np.ndarray], windows: Sequence[ProteinWindow], axis: int) -> np.ndarray:
    """Of each window's values for its residues, along `axis`, those that are kept, one behind the other."""
    kept = [np.take(part, range(window.kept_start - window.start, window.kept_stop - window.start), axis)
            for part, window in zip(parts, windows, strict=True)]
    return np.concatenate(kept, axis)
