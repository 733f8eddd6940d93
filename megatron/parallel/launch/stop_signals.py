"""Stop signals of the launcher, handled from its first moment on: so this module does not load torch, which is slow."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class StopSignals:
    """Knows whether this process was asked to stop; as long as it has no ranks, a signal ends it at once, with success.

    A thread reads the signals: the main thread may be inside torch, waiting for other hosts, where Python runs no
    handlers.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._has_ranks = False
        self.has_come = False  # whether a stop signal has come
        self.num_interrupts = 0  # how many of them were Ctrl-C

    def listen(self) -> None:
        """Handle the signals from now on; call it in the main thread."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in REQUESTS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
                signal.signal(number, lambda *_: None)
        threading.Thread(target=self._hear, args=(reader,), daemon=True).start()

    @contextmanager
    def without_ranks(self) -> Iterator[None]:
        """A context in which no rank runs, as before a start or a restart; outside of it some may."""
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


def listens(process: int, proc: Path = Path("/proc")) -> bool:
    """Whether a process handles SIGTERM, according to Linux (proc(5), SigCgt); True where there is no /proc."""
    if not proc.is_dir():
        return True
    try:
        lines = (proc / str(process) / "status").read_text().splitlines()
    except OSError:  # it has ended
        return False
    caught = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:")), -1)
    return bool(caught >> (signal.SIGTERM - 1) & 1)
