"""Signals that ask the program to stop, also while it is still loading: so this module imports nothing slow."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

REQUESTS_TO_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def leave_when_asked() -> None:
    """Let a stop signal end the process at once, until other handlers are installed: there is nothing to save yet."""
    for number in REQUESTS_TO_STOP:
        signal.signal(number, _leave)


@contextmanager
def requests_heard_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """A context in which `handler` receives the stop signals; the earlier handlers return after it."""
    before = {number: signal.signal(number, handler) for number in REQUESTS_TO_STOP}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def hear_usr1_again() -> None:
    """Installs the Python handler of SIGUSR1 again, in case that a library has taken its place.

    When Triton compiles its first kernel in a process, LLVM installs handlers of its own. For SIGTERM and SIGINT they
    call those that were there before; for SIGUSR1 they do not.
    """
    handler = signal.getsignal(signal.SIGUSR1)
    if handler is not None:  # None: it was not installed from Python
        signal.signal(signal.SIGUSR1, handler)


def _leave(number: int, frame: FrameType | None) -> None:
    # Where another rank has failed and left its status for the batch script, the launcher ends this one because of it.
    # (`status_file` of megatron.parallel.launch.environment, whose import would take time.)
    place = os.environ.get("EXIT_STATUS_FILE")
    if place is None or not os.path.exists(place):
        os.write(1, b"stopped: there is nothing to save\n")
    os._exit(0)
