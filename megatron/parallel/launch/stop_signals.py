"""How the launcher hears that it should stop, from its first moment on: torch takes seconds to load, so not from it."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class StopSignals:
    """Whether this process was asked to stop; while it has no ranks, such a request ends it at once, with success.

    A thread hears the requests: the main thread may be waiting for other hosts inside torch, where Python's own
    handlers have to wait too.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._has_ranks = False
        self.has_come = False  # whether there was a request to stop
        self.num_interrupts = 0  # how often Ctrl-C was one

    def listen(self) -> None:
        """Takes the signals from now on; the main thread calls this."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in REQUESTS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
                signal.signal(number, lambda *_: None)
        threading.Thread(target=self._hear, args=(reader,), daemon=True).start()

    @contextmanager
    def without_ranks(self) -> Iterator[None]:
        """While there are no ranks (again); outside of this there may be some."""
        self._set_has_ranks(False)
        yield
        self._set_has_ranks(True)

    def _set_has_ranks(self, has_ranks: bool) -> None:
        with self._lock:
            self._has_ranks = has_ranks

    def _hear(self, reader: int) -> None:
        while True:
            if (number := os.read(reader, 1)[0]) in REQUESTS:
                with self._lock:
                    self.num_interrupts += number == signal.SIGINT
                    self.has_come = True
                    if not self._has_ranks:
                        os.write(1, b"asked to stop before the training has started\n")
                        os._exit(0)
