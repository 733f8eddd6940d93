"""What a run says on its terminal: lines from one rank, how far it is, as a bar where a person watches, times in words.
"""

import io
import sys
import time
from collections.abc import Callable
from typing import Protocol

from megatron.errors import UserError

STOPPED = "stopped by Ctrl-C"
LINE_EVERY_S = 10.0  # where no terminal shows a bar


def take_any_text() -> None:
    r"""Let standard output and error write what their encoding lacks as an escape (`\udce9`); each door begins with it.

    A path is bytes and need be no UTF-8, and a terminal may be ASCII: to name a file must never end a run.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def exit_status(work: Callable[[], int | None]) -> int:
    """What a door ends with: what `work` gives, a UserError's status and line, 2 for a file's, 130 after Ctrl-C.

    All but the first with a line.
    """
    take_any_text()
    try:
        return work() or 0
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status if isinstance(error, UserError) else 2


def in_time(seconds: float) -> str:
    """Seconds as a person says them: 3.2 s, 41 s, 12 min, 3 h 05 min, 2 d 4 h."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def number_of(count: int, noun: str) -> str:
    """So many of what `noun` calls one of: 1 protein, 2,000 proteins."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


class Log:
    """Prints lines on rank 0 and nothing elsewhere; draws a progress bar on a terminal, and prints lines without one.
    """

    def __init__(self, is_speaker: bool = True) -> None:
        self.is_speaker = is_speaker

    def line(self, text: str) -> None:
        """Print `text`, above the progress bar if there is one."""
        if self.is_speaker:
            from tqdm import tqdm  # here, since tools/doctor.py tells where it is missing
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def progress(self, total: int, done: int, unit: str, label: str, has_own_lines: bool = False) -> "ProgressBar":
        """A progress bar over `total` units of which `done` are behind us; a line now and then where none is seen.

        Unless the work `has_own_lines`, which tell how far it is.
        """
        if not (self.is_speaker and sys.stderr.isatty()):
            return ProgressLines(Log(is_speaker=False) if has_own_lines else self, total, done, unit, label)
        from tqdm import tqdm
        return tqdm(total=total, initial=done, unit=unit, desc=label, dynamic_ncols=True, leave=False)


class ProgressBar(Protocol):
    """What is done with a progress bar."""

    def update(self, n: float | None = 1) -> bool | None:
        """Advance by `n` units."""

    def close(self) -> None:
        """Take the bar off the terminal."""


class ProgressLines:
    """A progress bar for a file: a line each LINE_EVERY_S, none of work that takes less."""

    def __init__(self, log: Log, total: int, done: int, unit: str, label: str) -> None:
        self._log, self._total, self._unit, self._label = log, total, unit, label
        self._begun, self._done = done, float(done)
        self._start_s = self._line_s = time.monotonic()

    def update(self, n: float | None = 1) -> None:
        """Advance by `n` units."""
        self._done = min(self._done + (n or 0), self._total)
        now_s = time.monotonic()
        if self._done > self._begun and now_s - self._line_s >= LINE_EVERY_S:
            self._line_s = now_s
            left_s = (now_s - self._start_s) * (self._total - self._done) / (self._done - self._begun)
            self._log.line(f"{self._label}: {self._done:,.0f} of {number_of(self._total, self._unit)}, "
                           f"{in_time(left_s)} left")

    def close(self) -> None:
        """Nothing: lines stay."""
