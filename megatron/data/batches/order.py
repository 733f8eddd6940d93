"""Which samples of the data a run trains on, one after the other: all, but for some that are left out."""

from collections.abc import Iterable

Windows = tuple[tuple[int, int], ...]  # the first sample of each and the one behind it, ascending, apart


def sample_at(position: int, left_out: Windows) -> int:
    """The sample at a position among those that are not left out, both from 0."""
    for first, stop in left_out:
        if position < first:
            break
        position += stop - first
    return position


def merged(windows: Iterable[tuple[int, int]]) -> Windows:
    """Windows in any order, which may overlap or touch, as such that do not."""
    apart = list[tuple[int, int]]()
    for first, stop in sorted(windows):
        if apart and first <= apart[-1][1]:
            first, stop = apart[-1][0], max(stop, apart.pop()[1])
        apart.append((first, stop))
    return tuple(apart)
