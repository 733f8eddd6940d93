"""What ranks agree on in a step, read by the host without waiting for the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.parallel.collectives import all_reduce_sum
from megatron.parallel.mesh import Axis


class Arriving:
    """Numbers on their way from the device to the host, where they are by the time that a later step reads them."""

    def __init__(self, numbers: Tensor) -> None:
        self._values, self._event = numbers, None
        if numbers.device.type != "cpu":
            self._values = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._values.copy_(numbers, non_blocking=True)
            self._event = torch.Event(numbers.device)
            self._event.record()

    def read(self) -> list[int]:
        """The values; waits for the copy alone, which was queued behind the step that gave them."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()


def summed(numbers: Sequence[int], axis: Axis, device: torch.device) -> Tensor:
    """The sums of whole numbers over the axis, on the device; all ranks call this."""
    values = torch.tensor(numbers, dtype=torch.int64)
    if device.type != "cpu":
        values = values.pin_memory().to(device, non_blocking=True)
    return all_reduce_sum(values, axis)
