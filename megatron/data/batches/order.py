"""Which samples of the data a run trains on, one after the other: all, but for some that are left out."""

from collections.abc import Iterable

Windows = tuple[tuple[int, int], ...]  # the first sample of each and the one behind it, ascending, apart


class SampleOrder:
    """Samples by their position among those that are not left out."""

    def __init__(self, left_out: Windows = ()) -> None:
        self._left_out = left_out

    def sample(self, position: int) -> int:
        """The sample at a position, both from 0."""
        for first, stop in self._left_out:
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
