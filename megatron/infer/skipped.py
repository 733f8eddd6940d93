"""Records that a program leaves out of its input: how many, why, and the first of them."""

from collections import Counter
from collections.abc import Sequence

from megatron.errors import DataError
from megatron.log import Log

FLAG = "--skip-bad-records"
REMEDY = f"mend it, or leave such records out with {FLAG}"
_MOST_TOLD = 10


class Skipped:
    """Counts records that are left out; `num_left` is the number of those that are kept."""

    def __init__(self) -> None:
        self.num_left = 0
        self._counts = Counter[str]()
        self._first = list[str]()

    def add(self, reason: str, message: str) -> None:
        """Count one record, left out for `reason`."""
        self.add_all({reason: 1}, [message])

    def add_all(self, counts: dict[str, int], messages: Sequence[str]) -> None:
        """Count records by the reasons for which they are left out; `messages` describe the first of them."""
        self._counts.update(counts)
        self._first += messages[:_MOST_TOLD - len(self._first)]

    def tell(self, what: str, log: Log, of: str = "protein") -> None:
        """Log what was left out of the input `what`; raises DataError, which calls a record `of`, if nothing is left.
        """
        for message in self._first:
            log.line(f"skipped: {message}")
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(self._counts.items()))
        if not self.num_left:
            raise DataError(f"{what}: no {of} is left" + (f" (skipped: {reasons})" if reasons else ""))
        if reasons:
            log.line(f"skipped {self._counts.total():,} records of {what}, {self.num_left:,} are left: {reasons}")
