"""What happened since the last log event: sums kept on the device, read once."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.parallel.collectives import all_reduce_sum
from megatron.parallel.mesh import Axis


@dataclass(frozen=True)
class Reading:
    """Means and sums over the steps since the last reading and over all ranks; evaluation and saving take no time."""

    num_steps: int
    loss: float
    masked_accuracy: float
    grad_norm: float
    num_skipped: int
    num_residues: int
    num_tokens: int
    model_flops: float
    elapsed_s: float


class Meters:
    """Collects steps; `read` gives them, summed over all ranks of `world`, and starts again."""

    def __init__(self, world: Axis, device: torch.device) -> None:
        self._world, self._device = world, device
        self._paused_s = 0.0
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
        """Count one step; the norm that is read is the last one's."""
        self._num_steps += 1
        self._grad_norm = grad_norm
        self._num_skipped += ~is_taken

    def pause(self) -> None:
        """Stop the clock: what comes is not training."""
        self._pause_began_s = time.perf_counter()

    def resume(self) -> None:
        """Let the clock run on."""
        self._paused_s += time.perf_counter() - self._pause_began_s

    def read(self) -> Reading:
        """What was collected since the last reading. Waits for the device, and for the other ranks."""
        sums = torch.cat([self._device_sums, torch.tensor(self._host_sums, dtype=torch.float64, device=self._device)])
        loss, correct, targets, residues, tokens, flops = all_reduce_sum(sums, self._world).tolist()
        reading = Reading(
            num_steps=self._num_steps, loss=loss / self._num_steps, masked_accuracy=correct / max(1.0, targets),
            grad_norm=float(self._grad_norm), num_skipped=int(self._num_skipped), num_residues=int(residues),
            num_tokens=int(tokens), model_flops=flops,
            elapsed_s=time.perf_counter() - self._began_s - self._paused_s)
        self.restart()
        return reading

    def restart(self) -> None:
        """Forget what was collected and start the clock."""
        self._device_sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        self._host_sums = [0.0] * 4
        self._num_steps = 0
        self._grad_norm = torch.zeros((), device=self._device)
        self._num_skipped = torch.zeros((), dtype=torch.int64, device=self._device)
        self._began_s, self._paused_s = time.perf_counter(), 0.0
