"""The loss scale of fp16 training, on the device, so that no step waits for it.

Multiplying the loss keeps small gradients from underflowing in fp16; a step whose gradients overflow is skipped.
"""

import torch
from torch import Tensor

from megatron.config import PrecisionConfig
from megatron.parallel.waits import read


class LossScale:
    """A factor on the loss: 1 in fp32 and bf16, fixed or dynamic in fp16.

    The dynamic one is Megatron-LM's: it doubles after `loss_scale_window` steps in a row without overflow. The
    `hysteresis`-th overflow since the start or the last doubling halves it, and so does each later one, but not below
    `min_loss_scale`.
    """

    def __init__(self, config: PrecisionConfig, device: torch.device) -> None:
        self._config = config
        self.is_dynamic = config.fp16 and config.loss_scale is None
        start = config.initial_loss_scale if self.is_dynamic else (config.loss_scale or 1.0) if config.fp16 else 1.0
        # The scale; overflows left until it halves; steps in a row without overflow.
        self._state = torch.tensor([start, config.hysteresis, 0.0], dtype=torch.float64, device=device)

    @property
    def value(self) -> Tensor:
        """The scale, fp32, on the device."""
        return self._state[0].float()

    @torch.no_grad()
    def update(self, is_finite: Tensor) -> None:
        """Adjust the scale after a step; `is_finite`, a bool scalar on the device: whether its gradients were finite.
        """
        if not self.is_dynamic:
            return
        scale, hysteresis, good_steps = self._state.unbind()
        config, good = self._config, is_finite.to(torch.bool)
        left = torch.where(good, hysteresis, hysteresis - 1)
        halved = torch.clamp(scale / 2, min=config.min_loss_scale)
        after_overflow = torch.where(left <= 0, halved, scale)
        good_steps = torch.where(good, good_steps + 1, torch.zeros_like(good_steps))
        grows = good_steps >= config.loss_scale_window
        after_good = torch.where(grows, scale * 2, scale)
        full = torch.full_like(left, config.hysteresis)
        self._state.copy_(torch.stack([torch.where(good, after_good, after_overflow), torch.where(grows, full, left),
                                       torch.where(grows, torch.zeros_like(good_steps), good_steps)]))

    def state(self) -> list[float]:
        """What a checkpoint keeps; waits for the device."""
        return read(self._state).tolist()

    def load_state(self, state: list[float]) -> None:
        """Continue from what `state()` returned; a fixed scale stays as it is."""
        if self.is_dynamic:
            self._state = torch.tensor(state, dtype=torch.float64, device=self._state.device)
