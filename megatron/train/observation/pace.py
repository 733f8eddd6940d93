"""Estimates how long a run will still take."""

import time

from megatron.train.state import TrainState
from megatron.train.step.meters import Reading


class Pace:
    """Estimates the time left, at each log event, until `last_sample` samples are consumed.

    Create it when the first step of this process begins.
    """

    def __init__(self, state: TrainState, last_sample: int) -> None:
        self._began_s, self._trained_s = time.perf_counter(), 0.0
        self._iteration, self._samples = state.iteration, state.consumed_samples  # at the last event
        self._last_sample = last_sample

    def time_left_s(self, reading: Reading, state: TrainState) -> float:
        """Seconds until the end: the rows left, at the pace of the steps in `reading`, plus evaluation and saving.

        These two are taken to need the same share of the time as so far. It counts rows, not steps, since the batch
        may grow.
        """
        self._trained_s += reading.elapsed_s
        share = max(1.0, (time.perf_counter() - self._began_s) / self._trained_s)
        rows_a_step = (state.consumed_samples - self._samples) / (state.iteration - self._iteration)
        self._iteration, self._samples = state.iteration, state.consumed_samples
        return (self._last_sample - self._samples) / rows_a_step * share * reading.elapsed_s / reading.num_steps
