"""Momentum SGD whose weight decay stands beside the momentum (Loshchilov and Hutter, 2019, arXiv 1711.05101)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class DecoupledSGD(torch.optim.SGD):
    """torch's fused SGD, which sees no decay: before its step parameters shrink by `lr * decay` of what they are.

    Where `found_inf`, set before each step, is 1 and the step not taken, they do not shrink; no one waits to know.
    """

    found_inf: Tensor

    def __init__(self, groups: list[dict], *, momentum: float) -> None:
        decoupled = [{**group, "weight_decay": 0.0, "decay": group["weight_decay"]} for group in groups]
        super().__init__(decoupled, lr=0.0, momentum=momentum, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step along the gradients."""
        for group in self.param_groups:
            if group["decays"] and group["params"]:
                torch._foreach_mul_(group["params"], 1 - group["lr"] * group["decay"] * (1 - self.found_inf))
            # torch's own would be without values until a step is taken, and the one behind it would read them.
            for parameter in group["params"] if group["momentum"] else ():
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return super().step(closure)
