"""An exponential average of the weights over the steps: often better to use than the weights that it follows."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Of each trained parameter, in `tensors` by its name, the fp32 average of this rank's part; it lies as that does.

    After the n-th step that was taken it keeps min(decay, (1 + n) / (10 + n)) of itself: it starts as the weights are,
    and forgets their first values as fast as a short run asks for. So it can be used at any time as it is, where one
    that is debiased has to be divided first. Whatever is read of a step lies on the device: nobody waits.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float, device: torch.device) -> None:
        self._parameters = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        self._decay = decay
        self.tensors = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._num_steps = torch.zeros((), dtype=torch.float64, device=device)

    @property
    def num_steps(self) -> int:
        """How many steps it is of; waits for the device."""
        return int(self._num_steps.item())

    @torch.no_grad()
    def update(self, is_taken: Tensor) -> None:
        """Take in the weights after a step, unless it was not taken (a bool scalar on the device)."""
        self._num_steps += is_taken
        kept = torch.clamp((1 + self._num_steps) / (10 + self._num_steps), max=self._decay)
        share = ((1 - kept) * is_taken).float()
        for name, parameter in self._parameters.items():
            self.tensors[name].lerp_(parameter, share)

    def go_on(self, num_steps: int) -> None:
        """As the average of so many steps, whose `tensors` were filled."""
        self._num_steps.fill_(num_steps)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the parameters have the average's values, and after it their own, to the bit."""
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
