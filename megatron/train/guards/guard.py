"""What is done of steps that go wrong (`--on-spike`): they are told, with their proteins, and rows may be left out.

Going back tells a fault of a device from one of the data: the same rows on the same weights give the same numbers
again, unless a device did not compute what it should have. Only what comes again is left out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.errors import DivergedError
from megatron.train.build.run import Run
from megatron.train.guards.suspects import write_suspects
from megatron.train.step.meters import StepSums

HELP = "lower --lr, lengthen the warm-up, or go on from an older checkpoint"


@dataclass(frozen=True)
class WrongSteps:
    """Steps of which the first went wrong, up to where that was noticed, and their rows, by position in the order."""

    first_step: int
    last_step: int
    rows: range


class RewindError(Exception):
    """The run is to go back: to see whether the steps of `window` go wrong again, or, as they did, without their rows.
    """

    def __init__(self, window: WrongSteps, is_again: bool) -> None:
        super().__init__(window)
        self.window, self.is_again = window, is_again


class Guard:
    """Looks at the steps of a run, which went back because of `suspect` if there is one. All ranks have one alike."""

    def __init__(self, run: Run, suspect: WrongSteps | None) -> None:
        self._run, self._config, self._suspect = run, run.config.guards, suspect
        self._looked_at = run.state.iteration
        self._rows: dict[int, range] = {}  # of the steps since
        self._num_skipped = 0  # in a row, up to there
        self._was_wrong = False  # the last step up to there
        self._was_least = False  # the loss scale there: as small as it may be

    def note(self, num_rows: int) -> None:
        """The next step takes so many rows."""
        first = self._run.state.consumed_samples
        self._rows[self._run.state.iteration + 1] = range(first, first + num_rows)

    def is_before_suspect(self) -> bool:
        """Whether the next step is the one that had gone wrong: a checkpoint from here saves doing all again."""
        return self._suspect is not None and self._run.state.iteration + 1 == self._suspect.first_step

    def look(self, steps: Sequence[StepSums]) -> None:
        """Judge the steps that were not yet; raises RewindError, or DivergedError.

        `steps`: of the last ones, up to the run's iteration, what was measured over all ranks.
        """
        last = self._run.state.iteration
        first = max(self._looked_at, last - len(steps)) + 1
        new = dict(zip(range(first, last + 1), steps[len(steps) - (last + 1 - first):], strict=True))
        wrong = {number: step for number, step in new.items() if self._is_wrong(step)}
        courses = dict(zip(new, self._run.judge.take_courses(), strict=True))
        if wrong:
            self._act(wrong, last, courses[min(wrong)])
        elif self._suspect is not None and self._suspect.first_step in new:
            first = self._suspect.first_step
            self._acquit(self._suspect, new[first], courses[first])
        self._looked_at, self._rows, self._was_wrong = last, {}, last in wrong
        scale = self._run.engine.loss_scale
        self._was_least = scale.is_dynamic and float(scale.value) <= self._run.config.precision.min_loss_scale

    def _is_wrong(self, step: StepSums) -> bool:
        # What the judge did not skip may be a loss scale that was too large.
        is_overflow = self._run.engine.loss_scale.is_dynamic and math.isfinite(step.loss) and (
            not math.isfinite(step.grad_norm))
        # On its way down to the least scale an overflow loses nothing.
        is_lost = self._was_least if is_overflow else not step.is_taken and self._config.on_spike != "rewind"
        self._num_skipped = self._num_skipped + 1 if is_lost else 0
        if self._num_skipped >= self._config.most_spikes:
            raise DivergedError(f"{self._num_skipped} steps in a row went wrong and were not taken, up to iteration "
                                f"{self._run.state.iteration}, as many as --most-spikes allows; {HELP}")
        if self._config.on_spike == "skip":
            return not (step.is_taken or is_overflow)
        loss, norm = torch.tensor([step.loss, step.grad_norm], dtype=torch.float64)
        return not self._run.judge.is_normal(loss, norm)

    def _act(self, wrong: dict[int, StepSums], last: int, course: Tensor) -> None:
        run, (first, step) = self._run, next(iter(wrong.items()))
        others = f", and {len(wrong) - 1} of the {last - first} behind it" if len(wrong) > 1 else ""
        text = f"note: step {first} went wrong{others}: {_in_words(step, course)}"
        if self._config.on_spike == "rewind":
            rows = range(self._rows[first].start, self._rows[last].stop)
            run.log.line(text)
            # Not the first of them alone: what does not compute the same twice may go wrong a step later.
            is_again = self._suspect is not None and self._suspect.first_step <= first <= self._suspect.last_step
            raise RewindError(WrongSteps(first, last, rows), is_again)
        fate = "taken all the same" if step.is_taken else "skipped"
        where = "" if self._was_wrong else write_suspects(run, first, self._rows[first])
        run.log.line(f"{text}; {fate}{where}")

    def _acquit(self, suspect: WrongSteps, step: StepSums, course: Tensor) -> None:
        self._suspect = None
        self._run.log.line(
            f"note: step {suspect.first_step} came out normal this time: {_in_words(step, course)}. The same rows and "
            "weights gave something else before, so a device or its memory failed, not the data: have the machine "
            "checked")


def _in_words(step: StepSums, course: Tensor) -> str:
    usual = [f" ({value:.4g} ± {width:.2g} in the steps before)" if math.isfinite(value) else ""
             for value, width in zip(*course.tolist(), strict=True)]
    return f"loss {step.loss:.4g}{usual[0]}, norm of the gradient {step.grad_norm:.4g}{usual[1]}"
