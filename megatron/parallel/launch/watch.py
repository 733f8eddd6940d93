"""Who holds up whom: before ranks give up waiting for others, they say where each of them is.

A thread of each rank looks whether the main one has stood still, in one call of one function, until a minute before the
timeout. Then it calls on all ranks, through the store, to tell where they are, and the first to have called prints the
answers. A rank that waits for others stands in a collective, or reads what one gave; who does not, or gives no answer,
holds them up.
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

LEAD_S = 60  # before the timeout; half of one that is shorter
_LOOKS = 8  # into the lead
_PACKAGE = Path(__file__).resolve().parents[2]
_WAITING = ("/parallel/collectives.py", "/parallel/pipeline/channels.py", "/parallel/waits.py")
_CALL, _ANSWER = "watch/call", "watch/answer"


class RankProgress:
    """What a rank is at, besides where in the program it is; `step` counts from 1."""

    step: int | None = None


@contextmanager
def watched(store: dist.Store, rank: int, num_ranks: int, timeout: timedelta, progress: RankProgress) -> Iterator[None]:
    """Within, this rank is watched. `timeout`: how long ranks wait for each other; `store`: the thread's own."""
    lead_s = min(LEAD_S, timeout.total_seconds() / 2)
    watch = _Watch(store, rank, num_ranks, timeout.total_seconds() - lead_s, lead_s, progress)
    threading.Thread(target=watch.look, name="watch", daemon=True).start()
    try:
        yield
    finally:
        watch.end.set()


class _Watch:
    def __init__(self, store: dist.Store, rank: int, num_ranks: int, patience_s: float, lead_s: float,
                 progress: RankProgress) -> None:
        self.end = threading.Event()
        self._store, self._rank, self._num_ranks, self._progress = store, rank, num_ranks, progress
        self._patience_s, self._lead_s = patience_s, lead_s
        self._main, self._host = threading.main_thread().ident, socket.gethostname()
        self._place: list[tuple[int, int]] = []
        self._since_s = time.monotonic()

    def look(self) -> None:
        """Until the end, or until there was a call, and the answers are told."""
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
            except dist.DistError:  # the store has gone, and with it the run
                pass
            else:
                return

    def _stood_still_s(self) -> float:
        place = [(id(frame), frame.f_lasti) for frame in self._frames()]
        if place != self._place:
            self._place, self._since_s = place, time.monotonic()
        return time.monotonic() - self._since_s

    def _here(self) -> str:
        step = "" if self._progress.step is None else f", step {self._progress.step}"
        frames = self._frames()
        verb = "waits for others" if any(map(_is_waiting, frames)) else "is not waiting for others"
        places = " < ".join(place for frame in reversed(frames) for place in _places(frame))
        return f"rank {self._rank} on {self._host}{step}: {verb}, in {places}"

    def _frames(self) -> list[FrameType]:
        """Where the main thread is, and those that autograd has made for backward passes."""
        known = {thread.ident for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread)}
        frames = sys._current_frames()
        return [frames[self._main or 0], *(frame for ident, frame in frames.items() if ident not in known)]

    def _tell(self, waited_s: float) -> None:
        time.sleep(self._lead_s / 2)  # the others hear it at their next look
        lines = [json.loads(self._store.get(key)) if self._store.check([key]) else (
            f"rank {rank}: does not answer: it is stopped, or it or its host is gone")
            for rank in range(self._num_ranks) if (key := f"{_ANSWER}/{rank}")]
        sys.stderr.write("".join(f"{line}\n" for line in (
            f"note: rank {self._rank} on {self._host} has waited {waited_s:.0f} s, and will give up "
            f"{self._lead_s:.0f} s after that (--distributed-timeout-minutes). Where the ranks are:",
            *(f"note:   {line}" for line in lines))))
        sys.stderr.flush()


def _is_waiting(frame: FrameType) -> bool:
    path = frame.f_code.co_filename
    return path.endswith(_WAITING) or "/torch/distributed/" in path


def _places(frame: FrameType | None) -> Iterator[str]:
    """The functions of this program that the frame is in, the innermost first, as FILE:LINE NAME."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE):
            yield f"{path.relative_to(_PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
