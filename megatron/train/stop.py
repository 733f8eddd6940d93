"""Requests to end a run early: by a signal, or because its time is up."""

import signal
import time
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType

import torch

from megatron.checkpoint.places import iterations
from megatron.parallel.collectives import all_reduce_sum
from megatron.parallel.mesh import Mesh
from megatron.parallel.waits import read
from megatron.train.signals import hear_usr1_again, requests_heard_by


class StopRequests:
    """Knows whether this process was asked to stop.

    `duration_min`: a time limit in minutes, counted from the creation of this object; None is no limit.
    """

    def __init__(self, duration_min: float | None) -> None:
        self._deadline_s = None if duration_min is None else time.monotonic() + 60 * duration_min
        self._was_signalled = False

    def wants_stop(self) -> bool:
        """Whether a signal has come, or the time is up, on this rank; call it in the main thread."""
        hear_usr1_again()
        return self._was_signalled or (self._deadline_s is not None and time.monotonic() >= self._deadline_s)

    def agreed(self, mesh: Mesh) -> bool:
        """Whether any rank wants to stop; a collective, so call it on all ranks. It waits for the device."""
        wishes = torch.tensor([self.wants_stop()], dtype=torch.int64, device=mesh.device)
        return bool(read(all_reduce_sum(wishes, mesh.world)))

    def listening(self) -> AbstractContextManager[None]:
        """A context in which SIGTERM, SIGUSR1 and the first SIGINT (Ctrl-C) ask to stop; a second Ctrl-C interrupts."""
        return requests_heard_by(self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._was_signalled = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def interruption(save: str | None) -> str:
    """The line to print when a second Ctrl-C has ended a run that saves into `save`: it says what is lost."""
    if save is None:
        return "interrupted by a second Ctrl-C; without --save nothing of this run is kept"
    places = iterations(Path(save))
    if not places:
        return f"interrupted by a second Ctrl-C before anything was saved in {save}"
    return (f"interrupted by a second Ctrl-C: what came after {places[max(places)]}, the last checkpoint, is lost; the "
            "same command goes on from there")
