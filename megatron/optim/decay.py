"""Decoupled weight decay, applied separately from an optimizer's step: plain or cautious."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def decay(parameter: Tensor, share: float | Tensor, along: Tensor | None) -> None:
    """Multiply a parameter by 1 - `share`, in place; with `along` only in coordinates that the step also moves to 0.

    Cautious Weight Decay (Chen et al., 2025, arXiv 2510.12402): a coordinate that the step makes larger does not decay,
    so that the decay does not pull away from the minimum of the loss. `along`: the parameter times the update that is
    about to be subtracted from it; where it is >= 0 the step goes towards 0. It is overwritten.
    """
    if along is None:
        parameter.mul_(1 - share)
    else:  # a float mask: bool tensors times a number are slow on CPUs
        parameter.addcmul_(parameter, along.ge_(0).mul_(share), value=-1)


class BesideAdamW(torch.optim.AdamW):
    """torch's fused AdamW without its own weight decay: parameters decay by `lr * decay` before the step, as in AdamW.

    For two things that torch's cannot do: cautious decay, and a decay that is a tensor, so that it can change between
    replays of a CUDA graph. It needs temporary memory for one parameter at a time. Where `found_inf` is 1 nothing
    decays; the host does not wait to know.
    """

    grad_scale: Tensor
    found_inf: Tensor

    def __init__(self, groups: list[dict], *, is_cautious: bool, **options: Any) -> None:
        beside = [{**group, "weight_decay": 0.0, "decay": group["weight_decay"]} for group in groups]
        super().__init__(beside, lr=0.0, fused=True, **options)
        self._is_cautious = is_cautious

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step along the gradients."""
        for group in self.param_groups:
            if group["decays"]:
                share = group["lr"] * group["decay"] * (1 - self.found_inf)
                for parameter in group["params"]:
                    along = self._moment_to_come(parameter, group).mul_(parameter) if self._is_cautious else None
                    decay(parameter, share, along)
        return super().step(closure)

    def _moment_to_come(self, parameter: Tensor, group: dict) -> Tensor:
        """The first moment as it will be after this step; the update has the same signs."""
        assert parameter.grad is not None
        moment, state = parameter.grad / self.grad_scale, self.state[parameter]
        return moment.lerp_(state["exp_avg"], group["betas"][0]) if state else moment
