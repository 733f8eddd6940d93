"""Where a rank waits for what passes between ranks, and for how long: communication that nothing computes beside.

On a CPU the host waits, and its clock is read. On a GPU the stream waits: an event is recorded before and one behind,
and their times are read once both have passed, so that nothing waits for the device because of it.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Mark = float | torch.Event | None


def read(tensor: Tensor, copied: torch.Event | None = None) -> Tensor:
    """`tensor` on the CPU: on a GPU the host waits here for all that is queued, and so for the ranks that it is of.

    Whatever ranks have summed is read by this, so that a rank that stands here is known to wait for others. `copied`:
    behind its copy to the CPU, where that was begun before; it alone is waited for.
    """
    if copied is not None:
        copied.synchronize()
    return tensor.cpu()


class Waits:
    """The seconds for which this rank has waited since it was last asked, while it counts them: in training steps."""

    def __init__(self, device: torch.device) -> None:
        self.is_counting = self._is_within = False
        self._is_on_gpu = device.type == "cuda"
        self._waited_s = 0.0
        self._under_way: deque[tuple[torch.Event, torch.Event]] = deque()
        self._spare: list[torch.Event] = []

    def during(self, wait: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """What `wait` gives; how long it takes is counted."""
        begin = self.begin()
        result = wait(*arguments, **named)
        self.end(begin)
        return result

    def begin(self) -> Mark:
        """A mark where a wait begins, for `end`; of one within another nothing is counted."""
        if not self.is_counting or self._is_within:
            return None
        if self._is_on_gpu and torch.cuda.is_current_stream_capturing():
            return None
        self._is_within = True
        return self._recorded() if self._is_on_gpu else time.perf_counter()

    def end(self, begin: Mark) -> None:
        """Count what lies between that mark and here."""
        if begin is None:
            return
        self._is_within = False
        if isinstance(begin, float):
            self._waited_s += time.perf_counter() - begin
        else:
            self._under_way.append((begin, self._recorded()))
            self._collect()

    def take_s(self) -> float:
        """The seconds so far, from where it counts anew; on a GPU what was queued has been waited for."""
        self._collect()
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def _recorded(self) -> torch.Event:
        event = self._spare.pop() if self._spare else torch.Event("cuda", enable_timing=True)
        event.record()
        return event

    def _collect(self) -> None:
        """Take the times of what has passed, and use its events again."""
        while self._under_way and self._under_way[0][1].query():
            begin, end = self._under_way.popleft()
            self._waited_s += begin.elapsed_time(end) / 1000
            self._spare += begin, end
