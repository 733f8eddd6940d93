"""How long a run will still take."""

import time

from megatron.train.meters import Reading


class Pace:
    """Begins where the steps begin; tells the time left at each log event."""

    def __init__(self) -> None:
        self._began_s, self._trained_s = time.perf_counter(), 0.0

    def time_left_s(self, reading: Reading, num_steps: int) -> float:
        """Seconds for `num_steps` steps at the pace of the last ones, `reading`, and what lies between steps.

        That is evaluation and saving, which have as large a share of the rest as of what is done.
        """
        self._trained_s += reading.elapsed_s
        share = max(1.0, (time.perf_counter() - self._began_s) / self._trained_s)
        return num_steps * share * reading.elapsed_s / reading.num_steps
