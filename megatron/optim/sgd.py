"""SGD with momentum and decoupled weight decay (Loshchilov and Hutter, 2019, arXiv 1711.05101)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class DecoupledSGD(torch.optim.SGD):
    """torch's fused SGD without its own weight decay: parameters are multiplied by 1 - `lr * decay` before the step.

    Where `found_inf`, set before each step, is 1, the step is skipped and they do not decay; the host does not wait to
    know.
    """

    found_inf: Tensor

    def __init__(self, groups: list[dict], *, momentum: float) -> None:
        decoupled = [{**group, "weight_decay": 0.0, "decay": group["weight_decay"]} for group in groups]
        super().__init__(decoupled, lr=0.0, momentum=momentum, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step along the gradients."""
        for group in self.param_groups:
            if group["decays"] and group["params"]:
                torch._foreach_mul_(group["params"], 1 - group["lr"] * group["decay"] * (1 - self.found_inf))
            # torch would leave its own uninitialised if the first step is skipped, and read it in the next.
            for parameter in group["params"] if group["momentum"] else ():
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return super().step(closure)
