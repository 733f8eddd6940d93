"""Measures steps between log events: sums stay on the device and are read once per log event."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.parallel.collectives import all_gather, all_reduce_sum
from megatron.parallel.mesh import Axis
from megatron.parallel.waits import Waits, read


class StepSums(NamedTuple):
    """What was measured of one step, over all ranks; floats, since they come from one tensor."""

    loss: float  # mean over the step's targets, nats
    num_correct: float  # targets predicted right
    num_targets: float
    num_residues: float
    num_tokens: float
    model_flops: float
    grad_norm: float
    is_taken: float  # 1: the weights were updated; 0: the step was skipped


class RankTimes(NamedTuple):
    """Seconds that one rank spent computing, and waiting for other ranks with nothing to compute meanwhile."""

    compute_s: float
    waited_s: float


@dataclass(frozen=True)
class Reading:
    """Means and sums over the steps since the last reading and over all ranks.

    A step whose rows hold no residue has no targets, and so neither loss nor gradient: `loss`, `masked_accuracy`,
    `grad_norm` and `num_skipped` are of the steps with targets, and the first three None if there was none.
    """

    num_steps: int
    num_steps_with_targets: int
    loss: float | None
    masked_accuracy: float | None
    grad_norm: float | None  # of the last step
    num_skipped: int
    num_residues: int
    num_tokens: int
    model_flops: float
    elapsed_s: float  # without evaluation and saving
    steps: list[StepSums]
    ranks: Sequence[RankTimes] = ()  # of each rank since the last reading in this process; empty with one rank


@dataclass(frozen=True)
class Totals:
    """What a run has consumed since its first step, over all ranks and all starts.

    The time is that of steps alone, without starting, evaluation and saving.
    """

    consumed_residues: int = 0
    training_s: float = 0.0
    consumed_flops: float = 0.0  # of the model

    def plus(self, residues: float, elapsed_s: float, flops: float) -> "Totals":
        """The totals after these were added."""
        return Totals(self.consumed_residues + int(residues), self.training_s + elapsed_s, self.consumed_flops + flops)


class Meters:
    """Collects the steps of this rank; `read` returns them summed over all ranks of `world`, and starts anew.

    `waits`: counts how long this rank waits for others; None with one rank.
    """

    def __init__(self, world: Axis, device: torch.device, waits: Waits | None = None) -> None:
        self._world, self._device, self._waits = world, device, waits
        self._pause_began_s: float | None = None
        self._totals: Totals | None = Totals()  # up to the last reading; None if the checkpoint did not record them
        self.restart()

    def add_loss(self, loss_share: Tensor, num_correct: Tensor) -> None:
        """Adds this micro-batch's share of the global mean loss. Call on exactly one rank per shard of targets."""
        self._device_sums[0] += loss_share.detach()
        self._device_sums[1] += num_correct

    def add_batch(self, num_targets: int, num_residues: int, num_tokens: int, model_flops: int) -> None:
        """Counts one micro-batch. Call on exactly one of the ranks that compute it."""
        for index, value in enumerate((num_targets, num_residues, num_tokens, model_flops)):
            self._host_sums[index] += value

    def add_step(self, grad_norm: Tensor, is_taken: Tensor) -> None:
        """Ends one step; every rank passes the same scalars: the gradient's norm, and whether the weights were updated.
        """
        self._steps.append((self._device_sums, self._host_sums, grad_norm, is_taken))
        self._begin_step()

    def loss_of_step(self) -> Tensor:
        """The mean loss of the present step, before `add_step`; fp64 on the device; a collective."""
        return all_reduce_sum(self._device_sums[:1].clone(), self._world)[0]

    def pause(self) -> None:
        """Stop the clock: what follows is not training."""
        self._pause_began_s = time.perf_counter()
        if self._waits is not None:
            self._waits.is_counting = False

    def resume(self) -> None:
        """Let the clock run on."""
        assert self._pause_began_s is not None, "the clock was stopped"
        self._paused_s += time.perf_counter() - self._pause_began_s
        self._pause_began_s = None
        if self._waits is not None:
            self._waits.is_counting = True

    def read(self) -> Reading:
        """What was collected since the last reading; a collective. Waits for the device."""
        steps = self._summed()
        sums, with_targets = _sums_of(steps), [step for step in steps if step.num_targets]
        losses = torch.tensor([step.loss for step in with_targets], dtype=torch.float64)
        reading = Reading(
            num_steps=len(steps), num_steps_with_targets=len(with_targets),
            loss=losses.mean().item() if with_targets else None,
            masked_accuracy=sums.num_correct / sums.num_targets if with_targets else None,
            grad_norm=with_targets[-1].grad_norm if with_targets else None,
            num_skipped=sum(not step.is_taken for step in with_targets), num_residues=int(sums.num_residues),
            num_tokens=int(sums.num_tokens), model_flops=sums.model_flops, elapsed_s=self._elapsed_s(), steps=steps,
            ranks=self._times_of_ranks())
        if self._totals is not None:
            self._totals = self._totals.plus(reading.num_residues, reading.elapsed_s, reading.model_flops)
        self.restart()
        return reading

    def totals(self) -> Totals | None:
        """The run's totals so far; None if it resumed from a checkpoint that did not record them.

        A collective. Waits for the device.
        """
        if self._totals is None or not self._steps:
            return self._totals
        sums = _sums_of(self._summed())
        return self._totals.plus(sums.num_residues, self._elapsed_s(), sums.model_flops)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the steps since the last reading, summed over the ranks; a collective."""
        return {"steps": self._summed() if self._steps else [], "elapsed_s": self._elapsed_s(),
                "totals": None if self._totals is None else asdict(self._totals)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from the state that `state()` returned, in any layout.

        Its totals are None if the run went on from a checkpoint of another program, which says nothing of them, and
        absent in runs from before there were any.
        """
        self.restart()
        totals = state.get("totals")
        self._totals = None if totals is None else Totals(**totals)
        for loss, correct, *of_batches, norm, is_taken in state["steps"]:
            if self._world.rank == 0:
                self._device_sums += torch.tensor([loss, correct], dtype=torch.float64, device=self._device)
                self._host_sums = of_batches
            self.add_step(torch.tensor(norm, device=self._device), torch.tensor(is_taken > 0, device=self._device))
        self._began_s -= state["elapsed_s"]
        self._before_s = state["elapsed_s"]

    def restart(self) -> None:
        """Forget what was collected and start the clock."""
        self._steps: list[tuple[Tensor, list[float], Tensor, Tensor]] = []
        self._begin_step()
        self._began_s, self._paused_s = time.perf_counter(), 0.0
        self._before_s = 0.0  # the part of the elapsed time that an earlier process spent

    def _times_of_ranks(self) -> list[RankTimes]:
        if self._waits is None:
            return []
        waited_s = self._waits.take_s()
        here = torch.tensor([[self._elapsed_s() - self._before_s - waited_s, waited_s]], dtype=torch.float64)
        return [RankTimes(*times) for times in read(all_gather(here.to(self._device), self._world)).tolist()]

    def _summed(self) -> list[StepSums]:
        """Each step over all ranks; a collective. Waits for the device."""
        on_device, on_host, norms, taken = zip(*self._steps, strict=True)
        sums = torch.cat([torch.stack(on_device), torch.tensor(on_host, dtype=torch.float64, device=self._device)], 1)
        alike = torch.stack([torch.stack(norms).double(), torch.stack(taken).double()], 1)
        return [StepSums(*step) for step in read(torch.cat([all_reduce_sum(sums, self._world), alike], 1)).tolist()]

    def _elapsed_s(self) -> float:
        now_s = time.perf_counter() if self._pause_began_s is None else self._pause_began_s
        return now_s - self._began_s - self._paused_s

    def _begin_step(self) -> None:
        self._device_sums = torch.zeros(2, dtype=torch.float64, device=self._device)  # loss, correct predictions
        self._host_sums = [0.0] * 4  # targets, residues, tokens, FLOPs


def _sums_of(steps: Sequence[StepSums]) -> StepSums:
    """Each field summed over the steps, of which there is one at least."""
    return StepSums(*map(sum, zip(*steps, strict=True)))
