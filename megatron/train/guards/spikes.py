"""Steps that go wrong: loss or norm of the gradient not finite, or far above those of the steps before.

Far is told in robust standard deviations, which the spikes themselves do not widen: 1.4826 times the median distance
from the median (Iglewicz and Hoaglin 1993). Nothing waits for the device.
"""

from typing import Any

import torch
from torch import Tensor

from megatron.config import GuardsConfig

HISTORY, LEAST = 128, 32  # steps that the next one is compared with; and before which none is far
_CONSISTENCY = 1.4826  # standard deviations of a normal distribution in its median distance from the median
_LEAST_DEVIATION = 0.005  # of the median: losses of one and the same batch again and again hardly differ


class SpikeJudge:
    """Tells normal steps from others, one after the other; tensors lie on `device`.

    `may_overflow`: in fp16 a gradient that is not finite may only say that the loss scale was too large.
    """

    def __init__(self, config: GuardsConfig, device: torch.device, may_overflow: bool) -> None:
        self._threshold, self._may_overflow = config.spike_threshold, may_overflow
        self._history_hq = torch.full((HISTORY, 2), torch.nan, dtype=torch.float64, device=device)  # q: loss, norm
        self._num_steps = torch.zeros((), dtype=torch.int64, device=device)
        self._places_h = torch.arange(HISTORY, device=device)
        self._courses: list[Tensor] = []  # [2, 2] each, as `course` has it

    @torch.no_grad()
    def is_normal(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether the next step is, a bool scalar; if so, later ones are compared with it. Both scalars; fp64 best.

        A step without targets, whose loss is 0, is normal, and nothing is compared with it.
        """
        values_q = torch.stack([loss.double(), norm.double()])
        middle_q, deviation_q = self.course()
        self._courses.append(torch.stack([middle_q, deviation_q]))
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

    def course(self) -> tuple[Tensor, Tensor]:
        """Median and robust standard deviation of the last normal steps' loss and norm, [2] each; nan before any."""
        middle_q = _nanmedian(self._history_hq)
        distance_q = _nanmedian((self._history_hq - middle_q).abs())
        return middle_q, torch.maximum(_CONSISTENCY * distance_q, _LEAST_DEVIATION * middle_q)

    def take_courses(self) -> list[Tensor]:
        """The `course` that each step judged since the last call was compared with, [2, 2] each."""
        courses, self._courses = self._courses, []
        return courses

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON has it."""
        num_steps = int(self._num_steps)
        return {"num_steps": num_steps, "steps": self._history_hq[:min(num_steps, HISTORY)].tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state()` gave."""
        steps = torch.tensor(state["steps"], dtype=torch.float64).reshape(-1, 2)
        self._history_hq[:len(steps)] = steps.to(self._history_hq.device)
        self._num_steps.fill_(state["num_steps"])


def _nanmedian(values_hq: Tensor) -> Tensor:
    """That of each column, the lower one of two, [q]; torch's own on GPUs refuses --deterministic-mode."""
    middle_q = ((~values_hq.isnan()).sum(0) - 1).clamp(min=0) // 2
    return values_hq.sort(0).values.gather(0, middle_q[None])[0]  # nan come last
