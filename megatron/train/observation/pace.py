"""How long a run will still take."""

import time

from megatron.train.state import TrainState
from megatron.train.step.meters import Reading


class Pace:
    """Begins where the steps begin; tells the time left, until `last_sample` is consumed, at each log event."""

    def __init__(self, state: TrainState, last_sample: int) -> None:
        self._began_s, self._trained_s = time.perf_counter(), 0.0
        self._iteration, self._samples = state.iteration, state.consumed_samples  # at the last event
        self._last_sample = last_sample

    def time_left_s(self, reading: Reading, state: TrainState) -> float:
        """Seconds for the rows left at the pace of the last steps, `reading`, and what lies between steps.

        That is evaluation and saving, which have as large a share of the rest as of what is done. Rows, since the batch
        may grow.
        """
        self._trained_s += reading.elapsed_s
        share = max(1.0, (time.perf_counter() - self._began_s) / self._trained_s)
        rows_a_step = (state.consumed_samples - self._samples) / (state.iteration - self._iteration)
        self._iteration, self._samples = state.iteration, state.consumed_samples
        return (self._last_sample - self._samples) / rows_a_step * share * reading.elapsed_s / reading.num_steps
