"""Requests to stop, also while the program loads; it imports nothing that takes time, for it is loaded first."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

REQUESTS_TO_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def leave_when_asked() -> None:
    """From now on, until something else listens, a request to stop ends the process: there is nothing to save yet."""
    for number in REQUESTS_TO_STOP:
        signal.signal(number, _leave)


@contextmanager
def requests_heard_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within, requests to stop go there."""
    before = {number: signal.signal(number, handler) for number in REQUESTS_TO_STOP}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(1, b"stopped: there is nothing to save\n")
    os._exit(0)
