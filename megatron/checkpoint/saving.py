"""Saves the checkpoints of a run, either while training waits or in a background thread."""

import errno
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.claim import Claim
from megatron.checkpoint.places import BEST
from megatron.checkpoint.sharded import Parts, Shares, write_parts
from megatron.checkpoint.store import (
    STATE,
    iterations,
    note_validation,
    place_of,
    point_to,
    prune,
    remove_left_over,
    set_aside,
    written_s,
)
from megatron.checkpoint.tensor_file import FileFacts, facts_of_file
from megatron.config import CheckpointConfig
from megatron.errors import CheckpointError, SaveError
from megatron.files import left_over, making_room, write_json
from megatron.log import Log
from megatron.parallel.mesh import Mesh
from megatron.parallel.placement import Part, part_of_state, placement_of


def parts_of(model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor],
             average: Mapping[str, Tensor] | None = None) -> dict[str, Part]:
    """This rank's part of every tensor of a checkpoint, by "model/NAME", "optimizer/KIND/NAME" and "ema/NAME".

    `model`: the parameters by name; `optimizer`: its state tensors by KIND/NAME; `average`: of the weights, by name.
    """
    parts = {f"model/{name}": placement_of(tensor).part(tensor) for name, tensor in model.items()}
    parts |= {f"ema/{name}": part_of_state(model[name], tensor) for name, tensor in (average or {}).items()}
    return parts | {f"optimizer/{key}": part_of_state(model[key.partition("/")[2]], tensor)
                    for key, tensor in optimizer.items()}


class Saver:
    """Writes checkpoints below `--save`; every rank has one, and all call `save` and `finish` together.

    With `--async-save`, `save` copies this rank's part to host memory and returns, and a thread writes it. At most one
    write is in progress; if it fails, the next call raises the error.

    `loaded`: the iteration that this run resumed from, 0 for a new run. Its checkpoint is never removed. Later
    checkpoints in the folder belong to an abandoned continuation; the first save renames them.
    `meet_disk`: called with the iteration before the last files of a checkpoint are written; tests inject faults here.
    """

    def __init__(self, config: CheckpointConfig, mesh: Mesh, claim: Claim | None, log: Log, loaded: int,
                 meet_disk: Callable[[int], None] = lambda iteration: None) -> None:
        assert config.save is not None
        self._config, self._root, self._claim, self._log = config, Path(config.save), claim, log
        self._writers, self._shares, self._device = mesh.writers, Shares(mesh.writers), mesh.device
        self._meet_disk = meet_disk
        self._loaded, self._is_first = loaded, True
        self.saved_at = loaded  # the iteration of the newest checkpoint that is known to be whole
        # A new thread's current device is the first GPU, where every rank would otherwise allocate memory.
        self._thread = ThreadPoolExecutor(1, "checkpoint", *(
            () if self._device.type != "cuda" else (torch.cuda.set_device, (self._device,))))
        self._under_way: Future[int] | None = None
        self._copies: dict[str, Tensor] = {}
        self._validations: dict[Path, tuple[float, str | None]] = {}  # not yet written
        self._has_told_of_others = False

    def save(self, iteration: int, parts: Parts, state: Mapping[str, Any]) -> None:
        """Write a checkpoint, or start to write it with --async-save; `state` goes into state.json.

        Raises SaveError if the disk refuses, else CheckpointError; with --async-save, those of the previous write.
        """
        self.finish()
        self.check_claim()
        if self._is_first and self._writers.rank == 0:
            remove_left_over(self._root)
            for place in set_aside(str(self._root), self._loaded):
                whose = f"the continuation that was left by going back to iteration {self._loaded}"
                self._log.line(f"note: {place.name} is of {whose if self._loaded else 'what was here before'}; "
                               "remove it if you do not need it")
        self._is_first = False
        parts = self._shares.share_of(parts)
        if not self._config.async_save:
            self._settle(partial(self._write, iteration, parts, state, None))
            return
        staged = {key: Part(self._copy(key, part.tensor), part.offsets, part.whole_shape)
                  for key, part in parts.items()}
        copied = None
        if self._device.type != "cpu":  # the copies run after this step and before the next one
            copied = torch.Event(self._device)
            copied.record()
        self._under_way = self._thread.submit(self._write, iteration, staged, state, copied)

    def check_claim(self) -> None:
        """Raises CheckpointError on rank 0 if another run has taken the folder over."""
        if self._claim is not None:
            self._claim.check()

    def poll(self) -> None:
        """Report the background write if it has ended, or raise its error; does not wait."""
        if self._under_way is not None and self._under_way.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the background write, if any; raises CheckpointError if it failed."""
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            self._settle(under_way.result)

    def close(self) -> None:
        """Wait for the background write, and end its thread; raises CheckpointError if the write failed."""
        try:
            self.finish()
        finally:
            self._thread.shutdown()

    def note_validation(self, iteration: int, loss: float, measured_on: str | None = None) -> None:
        """Record an iteration's validation loss beside its checkpoint, if there is one or the next save writes it.

        `measured_on`: the digest of the data that the loss was measured on.
        """
        if self._writers.rank == 0:
            self._validations[place_of(self._root, iteration)] = loss, measured_on
            self._keep_validations()

    def _write(self, iteration: int, parts: Parts, state: Mapping[str, Any], copied: torch.Event | None) -> int:
        place = place_of(self._root, iteration)
        if copied is not None:
            copied.synchronize()

        def write_state(temporary: Path) -> dict[str, FileFacts]:
            self._meet_disk(iteration)
            # Later than all other checkpoints, even if the clock was set back.
            last_s = max(map(written_s, iterations(self._root).values()), default=0.0)
            write_json(temporary / STATE, {**state, "written_s": max(time.time(), last_s + 1e-3)})
            return {STATE: facts_of_file(temporary / STATE)}

        try:
            write_parts(place, iteration, parts, self._writers, write_state)
        except (OSError, CheckpointError) as error:
            if self._writers.rank == 0:
                for rest in left_over(place):
                    shutil.rmtree(rest, ignore_errors=True)
            raise self._refused(place, error, parts) from error
        if self._writers.rank == 0:
            with suppress(OSError):  # the pointer may lag behind
                point_to(self._root, iteration)
            prune(self._root, keep=self._config.keep_checkpoints, keep_every=self._config.keep_every,
                  retain_optimizer=self._config.save_retain_optimizer,
                  spared={place, place_of(self._root, self._loaded)})
        return iteration

    def _refused(self, place: Path, error: OSError | CheckpointError, parts: Parts) -> CheckpointError:
        """The exception to raise for a failed write; `parts`: this rank's share, by which the size is estimated."""
        is_first = not iterations(self._root)
        kept = "No checkpoint exists yet" if is_first else "The last good checkpoint is untouched"
        if not isinstance(error, OSError):
            return CheckpointError(f"could not save {place}: {error}. {kept}")
        needed = self._writers.size * sum(part.tensor.numel() * part.tensor.element_size() for part in parts.values())
        refused = f"could not save {place}: {error.strerror or error}; it takes {needed / 1e6:,.1f} MB"
        if error.errno == errno.EFBIG:
            return SaveError(f"{refused}. {kept}; {making_room(error)}")
        try:
            room = f"{shutil.disk_usage(self._root).free / 1e6:,.1f} MB are free in {self._root}"
        except OSError as unknown:
            room = f"what is free in {self._root} cannot be asked ({unknown.strerror})"
        older = "" if is_first else "as by moving older iter_ folders away, "
        return SaveError(f"{refused}, and {room}. {kept}; {making_room(error)}, {older}or give another --save")

    def _settle(self, write: Callable[[], int]) -> None:
        """Call `write`, which returns the iteration that it wrote, and report it; its errors are raised."""
        self.saved_at = write()
        self._log.line(f"  saved checkpoint {place_of(self._root, self.saved_at)}")
        self._keep_validations()

    def _keep_validations(self) -> None:
        """Write the recorded validation losses of those checkpoints that are complete."""
        if self._under_way is not None:
            return
        # Checkpoints of an abandoned continuation, which the first save renames.
        left = {place for number, place in iterations(self._root).items() if self._is_first and number > self._loaded}
        waiting = {place: one for place, one in self._validations.items() if place in left or not place.exists()}
        for place in self._validations.keys() - waiting.keys():
            with suppress(OSError):  # where the disk is full the next save says so; the loss stands in the metrics too
                self._tell_of_others(place, note_validation(place, *self._validations[place]))
        self._validations = dict(list(waiting.items())[-1:])  # earlier iterations get no checkpoint any more

    def _tell_of_others(self, place: Path, others: Sequence[Path]) -> None:
        """Say once that `others` are not compared with the checkpoint at `place`."""
        if others and not self._has_told_of_others:
            self._has_told_of_others = True
            self._log.line(f"note: {BEST} has the lowest loss of those evaluated on what {place.name} was: that of "
                           f"others, up to {others[-1].name}, is of other data, or does not say of what")

    def _copy(self, key: str, tensor: Tensor) -> Tensor:
        """A copy in host memory; the buffer is reused for the next checkpoint."""
        copy = self._copies.get(key)
        if copy is None or copy.shape != tensor.shape:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
            self._copies[key] = copy
        return copy.copy_(tensor, non_blocking=True)
