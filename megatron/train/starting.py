"""What a request to stop does while the program loads; it imports nothing that takes time, for it is loaded first."""

import os
import signal
from types import FrameType

REQUESTS_TO_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def leave_when_asked() -> None:
    """From now on, until something else listens, a request to stop ends the process: there is nothing to save yet."""
    for number in REQUESTS_TO_STOP:
        signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(1, b"stopped: there is nothing to save\n")
    os._exit(0)
