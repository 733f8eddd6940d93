"""Weight decay that is done beside an optimizer's step: everywhere, or cautiously."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def decay(parameter: Tensor, share: float | Tensor, along: Tensor | None) -> None:
    """Take `share` off a parameter, in place; with `along` only where its step goes towards 0, too.

    Cautious Weight Decay (Chen et al., 2025, arXiv 2510.12402): a coordinate that its step makes larger is spared, so
    that the decay does not draw away from where the loss is least. `along`: the product of the parameter and of what is
    about to be subtracted from it, not negative where these agree; it is overwritten.
    """
    if along is None:
        parameter.mul_(1 - share)
    else:  # in numbers: truth values times a number are slow on CPUs
        parameter.addcmul_(parameter, along.ge_(0).mul_(share), value=-1)


class BesideAdamW(torch.optim.AdamW):
    """torch's fused AdamW, which sees no decay: before its step parameters shrink by `lr * decay`, as it would do it.

    For what torch's does not do: a decay that is cautious, and one that is a tensor, so that a CUDA graph may hold the
    step and the decay have a course. It takes the memory of no more than one parameter at a time. Where `found_inf` is
    1 nothing shrinks; no one waits to know.
    """

    grad_scale: Tensor
    found_inf: Tensor

    def __init__(self, groups: list[dict], *, is_cautious: bool, **options: Any) -> None:
        beside = [{**group, "weight_decay": 0.0, "decay": group["weight_decay"]} for group in groups]
        super().__init__(beside, lr=0.0, fused=True, **options)
        self._is_cautious = is_cautious

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step along the gradients."""
        for group in self.param_groups:
            if group["decays"]:
                share = group["lr"] * group["decay"] * (1 - self.found_inf)
                for parameter in group["params"]:
                    along = self._moment_to_come(parameter, group).mul_(parameter) if self._is_cautious else None
                    decay(parameter, share, along)
        return super().step(closure)

    def _moment_to_come(self, parameter: Tensor, group: dict) -> Tensor:
        """The first moment after this step, whose signs are the update's."""
        assert parameter.grad is not None
        moment, state = parameter.grad / self.grad_scale, self.state[parameter]
        return moment.lerp_(state["exp_avg"], group["betas"][0]) if state else moment
