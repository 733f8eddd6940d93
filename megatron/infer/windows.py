"""Windows of proteins that are too long for a model: overlapping ones over the whole protein, or one around a residue.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron.errors import ConfigError
from megatron.infer.pretrained import Pretrained


@dataclass(frozen=True)
class ProteinWindow:
    """The residues `start:stop` of a protein; results for `kept_start:kept_stop` are taken from this window, which
    shows more of their surroundings than any other.
    """

    start: int
    stop: int
    kept_start: int
    kept_stop: int


def longest_window(pretrained: Pretrained, asked: int | None, flag: str = "--window") -> int | None:
    """The most residues in a window: `asked` if given, else what the model's positions allow; None: any number.

    Raises ConfigError if the model has too few positions for `asked`.
    """
    limit = pretrained.max_residues
    if asked is not None and (asked < 1 or (limit is not None and asked > limit)):
        raise ConfigError(f"{flag} is {asked}; it must be 1 or greater" +
                          ("" if limit is None else f", and at most {limit}, whose positions the model knows"))
    return limit if asked is None else asked


def window_around(site: int, num_residues: int, longest: int | None) -> range:
    """The residues that a model sees when it predicts the one at `site`: ProteinGym's optimal window.

    The whole protein if it fits; else `longest` residues with the site in the middle, or as near to it as the ends of
    the protein allow.
    """
    if longest is None or num_residues <= longest:
        return range(num_residues)
    start = min(max(site - longest // 2, 0), num_residues - longest)
    return range(start, start + longest)


def windows_of(length: int, size: int | None) -> list[ProteinWindow]:
    """Windows of `size` residues (None: the whole protein), each overlapping the one before by half; the last ends with
    the protein.

    Results switch from one window to the next in the middle of their overlap, where both show equally much on each
    side.
    """
    if size is None or length <= size:
        return [ProteinWindow(0, length, 0, length)]
    starts = [*range(0, length - size, max(1, size // 2)), length - size]
    cuts = [0, *((start + before + size) // 2 for before, start in pairwise(starts)), length]
    return [ProteinWindow(start, start + size, *kept) for start, kept in zip(starts, pairwise(cuts), strict=True)]


def joined(parts: Sequence[np.ndarray], windows: Sequence[ProteinWindow], axis: int) -> np.ndarray:
    """The kept values of all windows of a protein, concatenated along `axis`."""
    kept = [np.take(part, range(window.kept_start - window.start, window.kept_stop - window.start), axis)
            for part, window in zip(parts, windows, strict=True)]
    return np.concatenate(kept, axis)
