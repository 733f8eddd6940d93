"""A run that goes on where the disk refuses a checkpoint: days of training are worth more than one of many saves."""

from collections.abc import Callable

from megatron.checkpoint.saving import Saver
from megatron.errors import SaveError


class PatientSaver(Saver):
    """A Saver that says what the disk refuses, and leaves it to the next save to try again.

    `outlook`: what it says of that, where not the usual.
    """

    outlook = "The run goes on, and the next save tries again"
    _failure: SaveError | None = None

    def check(self) -> None:
        """Raises SaveError where the last save has failed; for the end of a run, when there is no next one."""
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
