"""Records that a program leaves out of what it is asked about: how many, why, and which came first."""

from collections import Counter
from collections.abc import Sequence

from megatron.errors import DataError
from megatron.log import Log

FLAG = "--skip-bad-records"
REMEDY = f"mend it, or leave such records out with {FLAG}"
_MOST_TOLD = 10


class Skipped:
    """What was left out so far, and `num_left`, how many were not."""

    def __init__(self) -> None:
        self.num_left = 0
        self._counts = Counter[str]()
        self._first = list[str]()

    def add(self, reason: str, message: str) -> None:
        """Count a record that is left out for a reason."""
        self.add_all({reason: 1}, [message])

    def add_all(self, counts: dict[str, int], messages: Sequence[str]) -> None:
        """Count records by the reasons for which they are left out; `messages` tell of the first of them."""
        self._counts.update(counts)
        self._first += messages[:_MOST_TOLD - len(self._first)]

    def tell(self, what: str, log: Log, of: str = "protein") -> None:
        """Say what was left out of `what`; raises DataError where nothing, called `of`, is left."""
        for message in self._first:
            log.line(f"skipped: {message}")
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(self._counts.items()))
        if not self.num_left:
            raise DataError(f"{what}: no {of} is left" + (f" (skipped: {reasons})" if reasons else ""))
        if reasons:
            log.line(f"skipped {self._counts.total():,} records of {what}, {self.num_left:,} are left: {reasons}")
