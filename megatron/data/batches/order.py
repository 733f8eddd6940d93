"""Maps a position in a run to a sample of the data, when some windows of samples are left out of training."""

from collections.abc import Iterable

Windows = tuple[tuple[int, int], ...]  # (first sample, sample after the last), ascending, disjoint, not adjacent


def sample_at(position: int, left_out: Windows) -> int:
    """The number of the sample at `position` among those that are not left out; both count from 0."""
    for first, stop in left_out:
        if position < first:
            break
        position += stop - first
    return position


def merged(windows: Iterable[tuple[int, int]]) -> Windows:
    """The union of windows in any order, which may overlap or touch, as ascending disjoint windows."""
    apart = list[tuple[int, int]]()
    for first, stop in sorted(windows):
        if apart and first <= apart[-1][1]:
            first, stop = apart[-1][0], max(stop, apart.pop()[1])
        apart.append((first, stop))
    return tuple(apart)
