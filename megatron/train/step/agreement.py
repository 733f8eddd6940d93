"""Lets ranks agree on numbers in a step, which the host reads later without waiting for the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.parallel.collectives import all_reduce_sum
from megatron.parallel.mesh import Axis
from megatron.parallel.waits import read


class Arriving:
    """A copy of some numbers from the device to the host, under way; by the next step it has usually arrived."""

    def __init__(self, numbers: Tensor) -> None:
        self._values, self._event = numbers, None
        if numbers.device.type != "cpu":
            self._values = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._values.copy_(numbers, non_blocking=True)
            self._event = torch.Event(numbers.device)
            self._event.record()

    def read(self) -> list[int]:
        """The values. Waits for the copy, and so for the step that computed them, but for nothing queued after it."""
        return read(self._values, self._event).tolist()


def summed(numbers: Sequence[int], axis: Axis, device: torch.device) -> Tensor:
    """The sums of integers over the axis, int64 on the device; a collective."""
    values = torch.tensor(numbers, dtype=torch.int64)
    if device.type != "cpu":
        values = values.pin_memory().to(device, non_blocking=True)
    return all_reduce_sum(values, axis)
