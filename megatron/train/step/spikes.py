"""Detects spikes: steps whose loss or gradient norm is not finite, or far above that of the steps before.

The distance is measured in robust standard deviations, which spikes do not inflate: 1.4826 times the median absolute
deviation from the median (Iglewicz and Hoaglin 1993). The host never waits for the device.
"""

from typing import Any

import torch
from torch import Tensor

from megatron.config import GuardsConfig
from megatron.parallel.waits import read

HISTORY, LEAST = 128, 32  # steps that the next one is compared with; with fewer than the second none counts as far
_CONSISTENCY = 1.4826  # standard deviation / median absolute deviation of a normal distribution
_LEAST_DEVIATION = 0.005  # of the median: when one batch is trained on again and again, losses hardly differ


class SpikeJudge:
    """Judges step after step whether it is normal; its tensors are on `device`.

    `may_overflow`: under dynamic loss scaling a norm that is not finite is normal: the scale was too large.
    """

    def __init__(self, config: GuardsConfig, device: torch.device, may_overflow: bool) -> None:
        self._threshold, self._may_overflow = config.spike_threshold, may_overflow
        self._history_hq = torch.full((HISTORY, 2), torch.nan, dtype=torch.float64, device=device)  # q: loss, norm
        self._num_steps = torch.zeros((), dtype=torch.int64, device=device)
        self._places_h = torch.arange(HISTORY, device=device)
        self._usual: list[Tensor] = []  # [2, 2] each, as `usual` has it

    @torch.no_grad()
    def is_normal(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether the next step is normal, a bool scalar; if it is, later steps are compared with it.

        `loss` and `norm`: scalars, preferably fp64. A step without targets, whose loss is 0, is normal, but is not
        kept for comparison.
        """
        values_q = torch.stack([loss.double(), norm.double()])
        middle_q, deviation_q = self.usual()
        self._usual.append(torch.stack([middle_q, deviation_q]))
        is_finite_q = torch.isfinite(values_q)
        is_far_q = (values_q > middle_q + self._threshold * deviation_q) & (self._num_steps >= LEAST)
        is_wrong_q = is_far_q | ~is_finite_q
        if self._may_overflow:
            is_wrong_q = torch.stack([is_wrong_q[0], is_wrong_q[1] & is_finite_q[1]])
        is_normal = ~is_wrong_q.any()
        is_kept = is_normal & is_finite_q.all() & (values_q[0] > 0)
        is_here_h = (self._places_h == self._num_steps % HISTORY) & is_kept
        self._history_hq = torch.where(is_here_h[:, None], values_q, self._history_hq)
        self._num_steps = self._num_steps + is_kept
        return is_normal

    def usual(self) -> tuple[Tensor, Tensor]:
        """Median and robust standard deviation, [2] each, of the loss and norm of the last normal steps; nan at first.
        """
        middle_q = _nanmedian(self._history_hq)
        distance_q = _nanmedian((self._history_hq - middle_q).abs())
        return middle_q, torch.maximum(_CONSISTENCY * distance_q, _LEAST_DEVIATION * middle_q)

    def take_usual(self) -> list[Tensor]:
        """What each step since the last call was compared with: its `usual`, median and deviation stacked, [2, 2]."""
        usual, self._usual = self._usual, []
        return usual

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON values."""
        num_steps = int(read(self._num_steps))
        return {"num_steps": num_steps, "steps": read(self._history_hq[:min(num_steps, HISTORY)]).tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from the state that `state()` returned."""
        steps = torch.tensor(state["steps"], dtype=torch.float64).reshape(-1, 2)
        self._history_hq[:len(steps)] = steps.to(self._history_hq.device)
        self._num_steps.fill_(state["num_steps"])


def _nanmedian(values_hq: Tensor) -> Tensor:
    """The median of each column without its nan, the lower of two middle values, [q].

    torch.nanmedian on GPUs refuses --deterministic-mode.
    """
    middle_q = ((~values_hq.isnan()).sum(0) - 1).clamp(min=0) // 2
    return values_hq.sort(0).values.gather(0, middle_q[None])[0]  # nan sort last
