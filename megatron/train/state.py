"""How far a run has come, and the sizes of its steps."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.config import TrainingConfig
from megatron.data.batches.order import Windows, merged, sample_at
from megatron.errors import ConfigError


@dataclass
class TrainState:
    """Progress of a run; what a checkpoint keeps besides tensors.

    `left_out`: samples of the data that are not trained on; `num_rewinds`: how often the run has gone back for them.
    """

    iteration: int = 0
    consumed_samples: int = 0
    left_out: Windows = ()
    num_rewinds: int = 0

    @property
    def progress(self) -> dict[str, int]:
        """How far, as a checkpoint tells it."""
        return {"iteration": self.iteration, "consumed_samples": self.consumed_samples}

    @classmethod
    def from_saved(cls, progress: Mapping[str, int], guards: Mapping[str, Any]) -> "TrainState":
        """From what JSON has made of `progress`, and of the other fields in "guards", which may be missing."""
        windows = tuple((first, stop) for first, stop in guards.get("left_out", ()))
        return cls(**progress, left_out=windows, num_rewinds=guards.get("num_rewinds", 0))

    def sample_at(self, position: int) -> int:
        """The sample at a position among those that are trained on."""
        return sample_at(position, self.left_out)

    def leave_out(self, windows: Iterable[tuple[int, int]]) -> None:
        """Leave these samples out, too; raises ConfigError for such as the run has behind it."""
        position = self.sample_at(self.consumed_samples)
        new = [window for window in windows if merged([*self.left_out, window]) != self.left_out]
        for first, stop in new:
            if first < position:
                raise ConfigError(f"--leave-out-samples {first}-{stop}: the run has come to sample {position} already; "
                                  f"give {position}-{max(stop, position + 1)}, or go on from an older checkpoint")
        self.left_out = merged([*self.left_out, *new])


class BatchSizes:
    """The global batch of each step, with its ramp-up, and the end of training.

    Raises ConfigError where micro-batch size x data-parallel ranks does not divide a global batch, or the run ends
    before its first step does.
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
        """Rows of the step that starts after `consumed_samples`."""
        if not self._increment or consumed_samples >= self._samples:
            return self.final
        samples_a_size = self._samples / max(1, (self.final - self._start) // self._increment)
        return min(self.final, self._start + int(consumed_samples / samples_a_size) * self._increment)

    def last_iteration(self, state: TrainState) -> int:
        """The iteration at which a run that stands at `state` ends, whatever batches have brought it there."""
        return self.end(state)[0]

    def end(self, state: TrainState) -> tuple[int, int]:
        """That iteration, and the samples consumed by then.

        Counted in samples, a step that would pass the end is left out.
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
    """Whether what is done every so many steps, None for never, is done after this one."""
    return interval is not None and iteration % interval == 0
