"""What happened since the last log event: sums of each step, kept on the device and read once."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.parallel.collectives import all_gather, all_reduce_sum
from megatron.parallel.mesh import Axis
from megatron.parallel.waits import Waits


class StepSums(NamedTuple):
    """What is known of a step, over all ranks; the loss is the mean over its targets, `is_taken` 1 or 0."""

    loss: float
    num_correct: float
    num_targets: float
    num_residues: float
    num_tokens: float
    model_flops: float
    grad_norm: float
    is_taken: float


class RankTimes(NamedTuple):
    """Seconds of one rank: at work, and waiting for what others send while it had nothing to compute beside."""

    compute_s: float
    waited_s: float


@dataclass(frozen=True)
class Reading:
    """Means and sums over the steps since the last reading and over all ranks; evaluation and saving take no time.

    A step whose rows hold no residue has no targets, and so no loss and no gradient: loss, accuracy, norm (the last
    one's) and skipped steps are those of the steps with targets, None where there was none. `ranks`: of each rank,
    since this process began or since the last reading; none where there is one rank.
    """

    num_steps: int
    num_steps_with_targets: int
    loss: float | None
    masked_accuracy: float | None
    grad_norm: float | None
    num_skipped: int
    num_residues: int
    num_tokens: int
    model_flops: float
    elapsed_s: float
    steps: list[StepSums]
    ranks: Sequence[RankTimes] = ()


@dataclass(frozen=True)
class Totals:
    """What a run has taken since its first step, over all ranks: residues read, seconds of training, model FLOPs.

    The clock runs from the first step to the last, whatever a resumed run has to do again for its start; evaluation and
    saving take no time.
    """

    consumed_residues: int = 0
    training_s: float = 0.0
    consumed_flops: float = 0.0

    def plus(self, residues: float, elapsed_s: float, flops: float) -> "Totals":
        """These and what came after them."""
        return Totals(self.consumed_residues + int(residues), self.training_s + elapsed_s, self.consumed_flops + flops)


class Meters:
    """Collects steps; `read` gives them, summed over all ranks of `world`, and starts again. `waits`: of this rank."""

    def __init__(self, world: Axis, device: torch.device, waits: Waits | None = None) -> None:
        self._world, self._device, self._waits = world, device, waits
        self._pause_began_s: float | None = None
        self._totals: Totals | None = Totals()  # up to the last reading; None where a checkpoint did not say
        self.restart()

    def add_loss(self, loss_share: Tensor, num_correct: Tensor) -> None:
        """Add a micro-batch's loss, summed and over the targets of the global batch, on one rank that has it."""
        self._device_sums[0] += loss_share.detach()
        self._device_sums[1] += num_correct

    def add_batch(self, num_targets: int, num_residues: int, num_tokens: int, model_flops: int) -> None:
        """Count one micro-batch, on one of the ranks that compute it."""
        for index, value in enumerate((num_targets, num_residues, num_tokens, model_flops)):
            self._host_sums[index] += value

    def add_step(self, grad_norm: Tensor, is_taken: Tensor) -> None:
        """End one step."""
        self._steps.append((self._device_sums, self._host_sums, grad_norm, is_taken))
        self._begin_step()

    def loss_of_step(self) -> Tensor:
        """The loss of the step that has not ended, fp64 on the device; all ranks call this."""
        return all_reduce_sum(self._device_sums[:1].clone(), self._world)[0]

    def pause(self) -> None:
        """Stop the clock: what comes is not training."""
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
        """What was collected since the last reading. Waits for the device, and for the other ranks."""
        steps = self._summed()
        sums, norms, taken = steps[:, :6], steps[:, 6], steps[:, 7]
        has_targets = sums[:, 2] > 0
        loss = sums[has_targets, 0].mean().item()
        _, correct, targets, residues, tokens, flops = sums.sum(0).tolist()
        with_targets = [values[has_targets].tolist() for values in (norms, taken)]
        reading = Reading(
            num_steps=len(self._steps), num_steps_with_targets=int(has_targets.sum()), loss=loss if targets else None,
            masked_accuracy=correct / targets if targets else None, grad_norm=with_targets[0][-1] if targets else None,
            num_skipped=with_targets[1].count(0.0), num_residues=int(residues), num_tokens=int(tokens),
            model_flops=flops, elapsed_s=self._elapsed_s(), steps=[StepSums(*step) for step in steps.tolist()],
            ranks=self._times_of_ranks())
        if self._totals is not None:
            self._totals = self._totals.plus(residues, reading.elapsed_s, flops)
        self.restart()
        return reading

    def totals(self) -> Totals | None:
        """What the run has taken up to here; None where a checkpoint it went on from did not say.

        Waits for the device, and for the other ranks, which all call this.
        """
        if not self._steps:
            return self._totals
        _, _, _, residues, _, flops = self._summed()[:, :6].sum(0).tolist()
        return None if self._totals is None else self._totals.plus(residues, self._elapsed_s(), flops)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the steps since the last reading, summed over the ranks, which all call this."""
        return {"steps": self._summed().tolist() if self._steps else [], "elapsed_s": self._elapsed_s(),
                "totals": None if self._totals is None else asdict(self._totals)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state()` gave, in any layout; the totals of an edition that kept none are not known."""
        self.restart()
        totals = state.get("totals")
        self._totals = None if totals is None else Totals(**totals)
        for loss, correct, targets, residues, tokens, flops, norm, is_taken in state["steps"]:
            if self._world.rank == 0:
                self._device_sums += torch.tensor([loss, correct], dtype=torch.float64, device=self._device)
                self._host_sums = [targets, residues, tokens, flops]
            self.add_step(torch.tensor(norm, device=self._device), torch.tensor(is_taken > 0, device=self._device))
        self._began_s -= state["elapsed_s"]
        self._before_s = state["elapsed_s"]

    def restart(self) -> None:
        """Forget what was collected and start the clock."""
        self._steps: list[tuple[Tensor, list[float], Tensor, Tensor]] = []
        self._begin_step()
        self._began_s, self._paused_s = time.perf_counter(), 0.0
        self._before_s = 0.0  # of what elapsed, in a process before this one

    def _times_of_ranks(self) -> list[RankTimes]:
        if self._waits is None:
            return []
        waited_s = self._waits.take_s()
        here = torch.tensor([[self._elapsed_s() - self._before_s - waited_s, waited_s]], dtype=torch.float64)
        return [RankTimes(*times) for times in all_gather(here.to(self._device), self._world).tolist()]

    def _summed(self) -> Tensor:
        """Of each step loss, correct predictions, targets, residues, tokens, FLOPs, norm, and whether it was taken."""
        on_device, on_host, norms, taken = zip(*self._steps, strict=True)
        sums = torch.cat([torch.stack(on_device), torch.tensor(on_host, dtype=torch.float64, device=self._device)], 1)
        alike = torch.stack([torch.stack(norms).double(), torch.stack(taken).double()], 1)
        return torch.cat([all_reduce_sum(sums, self._world), alike], 1).cpu()

    def _elapsed_s(self) -> float:
        now_s = time.perf_counter() if self._pause_began_s is None else self._pause_began_s
        return now_s - self._began_s - self._paused_s

    def _begin_step(self) -> None:
        self._device_sums = torch.zeros(2, dtype=torch.float64, device=self._device)  # loss, correct predictions
        self._host_sums = [0.0] * 4  # targets, residues, tokens, FLOPs
