"""Prints where every rank is, shortly before a collective times out, so that the user sees which rank is stuck.

A background thread on each rank checks whether the main thread has stayed at one point of the program until a minute
before the timeout (`--distributed-timeout-minutes`). If so, it asks all ranks, through the store, where they are; the
first rank to ask prints the answers. The ranks that are waiting are inside a collective, or read the result of one; the
rank that is elsewhere, or does not answer, holds them up.
"""

import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch.distributed as dist

LEAD_S = 60  # how long before the timeout the ranks report; at most half of the timeout
_LOOKS = 8  # checks per lead time
_PACKAGE = Path(__file__).resolve().parents[2]
_WAITING = ("/parallel/collectives.py", "/parallel/pipeline/channels.py", "/parallel/waits.py")
_CALL, _ANSWER = "watch/call", "watch/answer"


class RankProgress:
    """The training step that a rank is at, counted from 1; None outside training."""

    step: int | None = None


@contextmanager
def watched(store: dist.Store, rank: int, num_ranks: int, timeout: timedelta, progress: RankProgress) -> Iterator[None]:
    """Watches this rank within the context: reports where all ranks are if this one waits nearly until the timeout.

    `timeout`: how long ranks wait for each other; `store`: a connection of the watching thread's own.
    """
    lead_s = min(LEAD_S, timeout.total_seconds() / 2)
    watch = _Watch(store, rank, num_ranks, timeout.total_seconds() - lead_s, lead_s, progress)
    threading.Thread(target=watch.look, name="watch", daemon=True).start()
    try:
        yield
    finally:
        watch.end.set()


class _Watch:
    """What the watching thread of one rank knows; `look` is its program.

    `patience_s`: how long the main thread may stay at one point before the ranks report; `lead_s`: the time that then
    remains until the timeout.
    """

    def __init__(self, store: dist.Store, rank: int, num_ranks: int, patience_s: float, lead_s: float,
                 progress: RankProgress) -> None:
        self.end = threading.Event()
        self._store, self._rank, self._num_ranks, self._progress = store, rank, num_ranks, progress
        self._patience_s, self._lead_s = patience_s, lead_s
        self._main, self._host = threading.main_thread().ident, socket.gethostname()
        self._place: list[tuple[int, int]] = []
        self._since_s = time.monotonic()

    def look(self) -> None:
        """Check the main thread regularly, until the context ends or the ranks have reported."""
        while not self.end.wait(self._lead_s / _LOOKS):
            try:
                is_called = self._store.check([_CALL])
                waited_s = self._stood_still_s()
                if not is_called and waited_s < self._patience_s:
                    continue
                first = int(self._store.compare_set(_CALL, "", str(self._rank)))
                self._store.set(f"{_ANSWER}/{self._rank}", json.dumps(self._here()))
                if first == self._rank:
                    self._tell(waited_s)
            except dist.DistError:  # the store is gone, and the run with it
                pass
            else:
                return

    def _stood_still_s(self) -> float:
        """The seconds for which no frame of the main thread, or of autograd, was seen to move."""
        place = [(id(frame), frame.f_lasti) for frame in self._frames()]
        if place != self._place:
            self._place, self._since_s = place, time.monotonic()
        return time.monotonic() - self._since_s

    def _here(self) -> str:
        """Where this rank is, in one line."""
        step = "" if self._progress.step is None else f", step {self._progress.step}"
        frames = self._frames()
        verb = "waits for others" if any(map(_is_waiting, frames)) else "is not waiting for others"
        places = " < ".join(place for frame in reversed(frames) for place in _places(frame))
        return f"rank {self._rank} on {self._host}{step}: {verb}, in {places}"

    def _frames(self) -> list[FrameType]:
        """The innermost frames of the main thread, and of the threads that autograd created for backward passes."""
        known = {thread.ident for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread)}
        frames = sys._current_frames()
        return [frames[self._main or 0], *(frame for ident, frame in frames.items() if ident not in known)]

    def _tell(self, waited_s: float) -> None:
        """Print the answers of all ranks to stderr."""
        time.sleep(self._lead_s / 2)  # the others see the request at their next check
        lines = [json.loads(self._store.get(key)) if self._store.check([key]) else (
            f"rank {rank}: does not answer: it is stopped, or it or its host is gone")
            for rank in range(self._num_ranks) if (key := f"{_ANSWER}/{rank}")]
        sys.stderr.write("".join(f"{line}\n" for line in (
            f"note: rank {self._rank} on {self._host} has waited {waited_s:.0f} s, and will give up "
            f"{self._lead_s:.0f} s after that (--distributed-timeout-minutes). Where the ranks are:",
            *(f"note:   {line}" for line in lines))))
        sys.stderr.flush()


def _is_waiting(frame: FrameType) -> bool:
    """Whether the frame is in torch.distributed, or in a file of _WAITING, where ranks wait for each other."""
    path = frame.f_code.co_filename
    return path.endswith(_WAITING) or "/torch/distributed/" in path


def _places(frame: FrameType | None) -> Iterator[str]:
    """The project's functions on the call stack of `frame`, innermost first, as FILE:LINE NAME."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE):
            yield f"{path.relative_to(_PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
