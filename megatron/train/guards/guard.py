"""Reacts to steps that go wrong (`--on-spike`): logs them with their proteins, or has the run rewound.

A rewind tells a faulty device from bad data: the same rows on the same weights give the same numbers again, unless a
device miscalculated. Rows are left out only if their steps go wrong twice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.errors import DivergedError
from megatron.parallel.waits import read
from megatron.train.guards.suspects import write_suspects
from megatron.train.setup.run import Run
from megatron.train.step.meters import StepSums

HELP = "lower --lr, lengthen the warm-up, or go on from an older checkpoint"


@dataclass(frozen=True)
class WrongSteps:
    """A window of steps: from the first that went wrong to the one at which that was noticed."""

    first_step: int
    last_step: int
    rows: range  # of all these steps, by their positions in the order of training


class RewindError(Exception):
    """Raised on all ranks to restart from the last checkpoint.

    First to run the steps of `window` once more; if they went wrong again (`is_again`), to leave out their rows.
    """

    def __init__(self, window: WrongSteps, is_again: bool) -> None:
        super().__init__(window)
        self.window, self.is_again = window, is_again


class Guard:
    """Watches the steps of a run; every rank has one and comes to the same decisions.

    `suspect`: the steps because of which the run was rewound, if it was.
    """

    def __init__(self, run: Run, suspect: WrongSteps | None) -> None:
        self._run, self._config, self._suspect = run, run.config.guards, suspect
        self._looked_at = run.state.iteration
        self._rows: dict[int, range] = {}  # of each step after `_looked_at`
        self._num_skipped = 0  # steps in a row, up to `_looked_at`, that were lost
        self._was_wrong = False  # whether step `_looked_at` was
        self._was_least = False  # whether the loss scale was at its minimum there

    def note(self, num_rows: int) -> None:
        """Note that the next step takes so many rows."""
        first = self._run.state.consumed_samples
        self._rows[self._run.state.iteration + 1] = range(first, first + num_rows)

    def is_before_suspect(self) -> bool:
        """Whether the next step is the one that went wrong before the rewind.

        A checkpoint is due then, so that a second rewind repeats nothing else.
        """
        return self._suspect is not None and self._run.state.iteration + 1 == self._suspect.first_step

    def look(self, steps: Sequence[StepSums]) -> None:
        """Judge the steps taken since the last call; raises RewindError or DivergedError.

        `steps`: the sums over all ranks of the most recent steps, the last of which is the run's iteration.
        """
        last = self._run.state.iteration
        first = max(self._looked_at, last - len(steps)) + 1
        new = dict(zip(range(first, last + 1), steps[len(steps) - (last + 1 - first):], strict=True))
        wrong = {number: step for number, step in new.items() if self._is_wrong(step)}
        usual = dict(zip(new, self._run.judge.take_usual(), strict=True))
        if wrong:
            self._act(wrong, last, usual[min(wrong)])
        elif self._suspect is not None and self._suspect.first_step in new:
            first = self._suspect.first_step
            self._acquit(self._suspect, new[first], usual[first])
        self._looked_at, self._rows, self._was_wrong = last, {}, last in wrong
        scale = self._run.engine.loss_scale
        self._was_least = scale.is_dynamic and float(read(scale.value)) <= self._run.config.precision.min_loss_scale

    def _is_wrong(self, step: StepSums) -> bool:
        # In fp16 a finite loss with a gradient that is not means that the loss scale was too large.
        is_overflow = self._run.engine.loss_scale.is_dynamic and math.isfinite(step.loss) and (
            not math.isfinite(step.grad_norm))
        # An overflow is no lost step while the scale can still be lowered.
        is_lost = self._was_least if is_overflow else not step.is_taken and self._config.on_spike != "rewind"
        self._num_skipped = self._num_skipped + 1 if is_lost else 0
        if self._num_skipped >= self._config.most_spikes:
            raise DivergedError(f"{self._num_skipped} steps in a row went wrong and were not taken, up to iteration "
                                f"{self._run.state.iteration}, as many as --most-spikes allows; {HELP}")
        if self._config.on_spike == "skip":
            return not (step.is_taken or is_overflow)
        loss, norm = torch.tensor([step.loss, step.grad_norm], dtype=torch.float64)
        return not self._run.judge.is_normal(loss, norm)

    def _act(self, wrong: dict[int, StepSums], last: int, usual: Tensor) -> None:
        run, (first, step) = self._run, next(iter(wrong.items()))
        others = f", and {len(wrong) - 1} of the {last - first} after it" if len(wrong) > 1 else ""
        text = f"note: step {first} went wrong{others}: {_in_words(step, usual)}"
        if self._config.on_spike == "rewind":
            rows = range(self._rows[first].start, self._rows[last].stop)
            run.log.line(text)
            # Any step of the window counts: sums in another order may bring the spike a step later.
            is_again = self._suspect is not None and self._suspect.first_step <= first <= self._suspect.last_step
            raise RewindError(WrongSteps(first, last, rows), is_again)
        fate = "taken all the same" if step.is_taken else "skipped"
        where = "" if self._was_wrong else write_suspects(run, first, self._rows[first])
        run.log.line(f"{text}; {fate}{where}")

    def _acquit(self, suspect: WrongSteps, step: StepSums, usual: Tensor) -> None:
        self._suspect = None
        self._run.log.line(
            f"note: step {suspect.first_step} came out normal this time: {_in_words(step, usual)}. The same rows and "
            "weights gave something else before, so a device or its memory failed, not the data: have the machine "
            "checked")


def _in_words(step: StepSums, usual: Tensor) -> str:
    beside = [f" ({value:.4g} ± {width:.2g} in the steps before)" if math.isfinite(value) else ""
             for value, width in zip(*usual.tolist(), strict=True)]
    return f"loss {step.loss:.4g}{beside[0]}, norm of the gradient {step.grad_norm:.4g}{beside[1]}"
