"""How far a run has come, and the sizes of its steps."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.config import TrainingConfig
from megatron.data.batches.order import Windows, merged, sample_at
from megatron.errors import ConfigError


@dataclass
class TrainState:
    """How far a run is. A checkpoint keeps all of it.

    `left_out`: half-open ranges of samples that are not trained on. `num_rewinds`: how often the run went back to a
    checkpoint to leave some out.
    """

    iteration: int = 0
    consumed_samples: int = 0
    left_out: Windows = ()
    num_rewinds: int = 0

    @property
    def progress(self) -> dict[str, int]:
        """The part of it that a checkpoint keeps as "progress"; it keeps the rest in "guards"."""
        return {"iteration": self.iteration, "consumed_samples": self.consumed_samples}

    @classmethod
    def from_saved(cls, progress: Mapping[str, int], guards: Mapping[str, Any]) -> "TrainState":
        """The state of a checkpoint, from its "progress" and its "guards" as JSON; "guards" may be empty."""
        windows = tuple((first, stop) for first, stop in guards.get("left_out", ()))
        return cls(**progress, left_out=windows, num_rewinds=guards.get("num_rewinds", 0))

    def sample_at(self, position: int) -> int:
        """The number of the sample at `position` in the order of training, which passes over those left out."""
        return sample_at(position, self.left_out)

    def leave_out(self, windows: Iterable[tuple[int, int]]) -> None:
        """Leave these half-open ranges of samples out as well; raises ConfigError if the run has passed one already."""
        position = self.sample_at(self.consumed_samples)
        new = [window for window in windows if merged([*self.left_out, window]) != self.left_out]
        for first, stop in new:
            if first < position:
                raise ConfigError(f"--leave-out-samples {first}-{stop}: the run has come to sample {position} already; "
                                  f"give {position}-{max(stop, position + 1)}, or go on from an older checkpoint")
        self.left_out = merged([*self.left_out, *new])


class BatchSizes:
    """The global batch size of each step, in rows, including the ramp-up; and the last step of the run.

    `final` is the size after the ramp-up, `rows_a_micro_step` the rows of one micro-batch on all data-parallel ranks
    together. Raises ConfigError where the latter does not divide a global batch, or the run would end within its first
    step.
    """

    def __init__(self, config: TrainingConfig, data_size: int) -> None:
        micro_rows = config.micro_batch_size * data_size
        self.final = config.global_batch_size or micro_rows
        self.rows_a_micro_step = micro_rows
        self._config = config
        self._start, self._increment, self._samples = config.rampup_batch_size or (self.final, 0, 0)
        for rows, flag in ((self.final, "--global-batch-size"), (self._start, "--rampup-batch-size START"),
                           (self._increment, "--rampup-batch-size INCREMENT")):
            if rows % micro_rows:
                raise ConfigError(f"{flag} {rows} is not divisible by --micro-batch-size {config.micro_batch_size} x "
                                  f"{data_size} data-parallel ranks; take a multiple of {micro_rows}")
        if self._increment and (self.final < self._start or (self.final - self._start) % self._increment):
            raise ConfigError(f"--rampup-batch-size: {self._start} does not reach --global-batch-size {self.final} in "
                              f"steps of {self._increment}")
        if config.train_samples is not None and config.train_samples < self._start:
            raise ConfigError(f"--train-samples {config.train_samples} is less than the {self._start} rows of the "
                              f"first step; give at least {self._start}, or a smaller --global-batch-size")

    def at(self, consumed_samples: int) -> int:
        """The global batch size of the step that starts after `consumed_samples`."""
        if not self._increment or consumed_samples >= self._samples:
            return self.final
        samples_a_size = self._samples / max(1, (self.final - self._start) // self._increment)
        return min(self.final, self._start + int(consumed_samples / samples_a_size) * self._increment)

    def last_iteration(self, state: TrainState) -> int:
        """The number of the last step of a run that is now at `state`, whatever its batch sizes were before."""
        return self.end(state)[0]

    def end(self, state: TrainState) -> tuple[int, int]:
        """The number of that last step, and the samples consumed after it.

        Under --train-samples no step is taken that would consume more than those.
        """
        config, iteration, consumed = self._config, state.iteration, state.consumed_samples
        if config.train_iters is not None:
            return config.train_iters, consumed + max(0, config.train_iters - iteration) * self.final
        assert config.train_samples is not None
        while consumed < self._samples and consumed + self.at(consumed) <= config.train_samples:
            consumed += self.at(consumed)
            iteration += 1
        steps = max(0, config.train_samples - consumed) // self.final if consumed >= self._samples else 0
        return iteration + steps, consumed + steps * self.final


def is_due(interval: int | None, iteration: int) -> bool:
    """Whether something done every `interval` steps (None: never) is done after step `iteration`."""
    return interval is not None and iteration % interval == 0
