"""What ranks agree on in a step, read by the host without waiting for the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.parallel.collectives import all_reduce_sum
from megatron.parallel.mesh import Axis


class Arriving:
    """A scalar on its way from the device to the host, where it has arrived by the time that a later step reads it."""

    def __init__(self, scalar: Tensor) -> None:
        self._value, self._event = scalar, None
        if scalar.device.type != "cpu":
            self._value = torch.empty(scalar.shape, dtype=scalar.dtype, pin_memory=True)
            self._value.copy_(scalar, non_blocking=True)
            self._event = torch.Event(scalar.device)
            self._event.record()

    def read(self) -> int:
        """The value; waits for the copy alone, which was queued behind the step that gave it."""
        if self._event is not None:
            self._event.synchronize()
        return int(self._value)


def summed(numbers: Sequence[int], axis: Axis, device: torch.device) -> list[Tensor]:
    """The sums of whole numbers over the axis, on the device; all ranks call this."""
    values = torch.tensor(numbers, dtype=torch.int64)
    if device.type != "cpu":
        values = values.pin_memory().to(device, non_blocking=True)
    return list(all_reduce_sum(values, axis).unbind())
