"""Why a run may end early: a signal, or its time is up."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequests:
    """Whether this process was asked to stop. `duration_min` counts from the making of the object; None is no limit."""

    def __init__(self, duration_min: float | None) -> None:
        self._deadline_s = None if duration_min is None else time.monotonic() + 60 * duration_min
        self._was_signalled = False

    def wants_stop(self) -> bool:
        """True from the first signal, or from the deadline on."""
        return self._was_signalled or (self._deadline_s is not None and time.monotonic() >= self._deadline_s)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM and the first SIGINT (Ctrl-C) as requests; a second Ctrl-C interrupts at once."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._was_signalled = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
