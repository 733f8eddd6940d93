"""An exponential moving average (EMA) of the weights over the steps: often a better model than the weights themselves.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megatron.parallel.waits import read


class WeightAverage:
    """The average of each trained parameter: `tensors`, by name, fp32, this rank's part, placed like the parameter.

    It starts as the weights. The n-th step that is taken keeps min(decay, (1 + n) / (10 + n)) of it, so that it forgets
    the initial weights quickly and can be used at any time without a bias correction. It never waits for the device.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float, device: torch.device) -> None:
        self._parameters = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        self._decay = decay
        self.tensors = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._num_steps = torch.zeros((), dtype=torch.float64, device=device)

    @property
    def num_steps(self) -> int:
        """The number of steps averaged; waits for the device."""
        return int(read(self._num_steps))

    @torch.no_grad()
    def update(self, is_taken: Tensor) -> None:
        """Add the weights after a step; `is_taken`, a bool scalar on the device: False leaves the average as it is."""
        self._num_steps += is_taken
        kept = torch.clamp((1 + self._num_steps) / (10 + self._num_steps), max=self._decay)
        share = ((1 - kept) * is_taken).float()
        for name, parameter in self._parameters.items():
            self.tensors[name].lerp_(parameter, share)

    def go_on(self, num_steps: int) -> None:
        """Resume as the average of so many steps, after `tensors` were filled from a checkpoint."""
        self._num_steps.fill_(num_steps)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the parameters have the average's values; after it they have their own, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            own = parameter.detach().clone()
            parameter.copy_(self.tensors[name])
            self.tensors[name].copy_(own)
