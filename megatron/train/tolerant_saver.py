"""Saving that survives a full disk: the run goes on, since days of training are worth more than one checkpoint."""

from collections.abc import Callable, Mapping
from typing import Any

from megatron.checkpoint.saving import Saver
from megatron.checkpoint.sharded import Parts
from megatron.errors import SaveError

GOES_ON = "The run goes on, and the next save tries again"


class TolerantSaver(Saver):
    """A Saver that logs a failed save instead of raising; the next save tries again."""

    _outlook = GOES_ON
    _failure: SaveError | None = None

    def save(self, iteration: int, parts: Parts, state: Mapping[str, Any], outlook: str = GOES_ON) -> None:
        """Write a checkpoint, or have it written; `outlook`: what happens next, the end of the line logged if it fails.
        """
        self.finish()
        self._outlook = outlook
        super().save(iteration, parts, state)

    @property
    def has_failed(self) -> bool:
        """Whether the last save that has ended failed."""
        return self._failure is not None

    def check(self) -> None:
        """Raises SaveError if the last save failed; for the end of a run, when no other follows."""
        self.finish()
        if self._failure is not None:
            raise self._failure

    def _settle(self, write: Callable[[], int]) -> None:
        try:
            super()._settle(write)
            self._failure = None
        except SaveError as error:
            # The end says once more why, as an error.
            is_told = self._failure is not None and self._outlook != GOES_ON
            self._log.line(f"note: {'the disk has refused this checkpoint, too' if is_told else error}. "
                           f"{self._outlook}")
            self._failure = error
