"""Saving that survives a full disk: the run goes on, since days of training are worth more than one checkpoint."""

from collections.abc import Callable

from megatron.checkpoint.saving import Saver
from megatron.errors import SaveError


class PatientSaver(Saver):
    """A Saver that logs a failed save instead of raising; the next save tries again.

    `outlook`: the end of that log line, which says what happens next.
    """

    outlook = "The run goes on, and the next save tries again"
    _failure: SaveError | None = None

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
            self._log.line(f"note: {error}. {self.outlook}")
            self._failure = error
