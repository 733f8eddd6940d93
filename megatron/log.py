"""Output on the terminal: lines from one rank, progress bars, readable times and counts, and exit statuses."""

import io
import logging
import sys
import time
from collections.abc import Callable
from typing import Protocol

from megatron.errors import UserError
from megatron.files import refusal

STOPPED = "stopped by Ctrl-C"
LINE_EVERY_S = 10.0  # between progress lines, if there is no terminal for a bar


def take_any_text() -> None:
    r"""Make standard output and error write unencodable characters as escapes (`\udce9`), called first in each program.

    A path need not be UTF-8, and a terminal may be ASCII, but printing a file's name must never end a run.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def hush_matplotlib() -> None:
    """Make matplotlib, where a program imports it later, keep its notes on folders and fonts to itself.

    Where HOME cannot be written, it says at length that it takes a temporary folder: that needs nothing of the user.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)


def exit_status(work: Callable[[], int | None]) -> int:
    """The exit status of a command-line program whose work is `work`.

    It is what `work` returns (None: 0), a UserError's own status, 2 for an OSError, or 130 for Ctrl-C; the latter three
    print one line on standard error.
    """
    take_any_text()
    hush_matplotlib()
    try:
        return work() or 0
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        print(f"error: {refusal(error) if isinstance(error, OSError) else error}", file=sys.stderr)
        return error.exit_status if isinstance(error, UserError) else 2


def in_time(seconds: float) -> str:
    """A duration as text: 3.2 s, 41 s, 12 min, 3 h 05 min, 2 d 4 h."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def number_of(count: int, noun: str) -> str:
    """A count with its noun, given in the singular: 1 protein, 2,000 proteins."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


class Log:
    """Prints lines, and shows progress as a bar on a terminal or as lines without one; only if `is_speaker` (rank 0).
    """

    def __init__(self, is_speaker: bool = True) -> None:
        self.is_speaker = is_speaker

    def line(self, text: str) -> None:
        """Print `text`, above the progress bar if there is one."""
        if self.is_speaker:
            from tqdm import tqdm  # here, so that tools/doctor.py can report if it is missing
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def progress(self, total: int, done: int, unit: str, label: str, has_own_lines: bool = False) -> "ProgressBar":
        """A progress bar over `total` units, of which `done` are done; without a terminal, a line every LINE_EVERY_S.

        `has_own_lines`: the work prints its own progress, so that no lines are needed.
        """
        if not (self.is_speaker and sys.stderr.isatty()):
            return ProgressLines(Log(is_speaker=False) if has_own_lines else self, total, done, unit, label)
        from tqdm import tqdm
        return tqdm(total=total, initial=done, unit=unit, desc=label, dynamic_ncols=True, leave=False)


class ProgressBar(Protocol):
    """The interface of a progress bar."""

    def update(self, n: float | None = 1) -> bool | None:
        """Advance by `n` units."""

    def close(self) -> None:
        """Remove the bar from the terminal."""


class ProgressLines:
    """A progress bar's replacement without a terminal: a line every LINE_EVERY_S, none for work that takes less."""

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
        """Does nothing: lines stay."""
