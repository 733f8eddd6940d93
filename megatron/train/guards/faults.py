"""Faults made on purpose (`--inject-fault`), to test how the program handles them."""

import errno
import math
import os
import signal
import time

from megatron.config import Config
from megatron.data.rows.cache_files import choose_cache_folder
from megatron.data.rows.data_path import parse_data_path
from megatron.files import replacing
from megatron.parallel.collectives import all_gather_object
from megatron.parallel.mesh import Axis

TRUNCATED_CACHE = "truncated-cache"
_FACTORS = {"nan": math.nan, "spike": 1000.0, "flip": math.nan}
_LONGEST_S = 1.0  # of a slow rank's delay: the time since the last step may include an evaluation


class Faults:
    """Makes the faults of `config`, each KIND@STEP. A collective: all ranks of `world` create this together.

    nan and spike are bound to the rows of that step and come back with them; flip happens once, as if a device had
    failed. stuck makes the last rank hang at that step, dead kills it, slow doubles the time of each of its steps from
    there on. full-disk fails the first checkpoint written at that step or later. truncated-cache, without a step, cuts
    the row indices on disk short when this object is created.
    """

    def __init__(self, config: Config, world: Axis) -> None:
        told = config.guards.inject_fault or ()
        self._is_last_rank = world.rank == world.size - 1
        self._steps = {int(step): kind for kind, _, step in (text.partition("@") for text in told)
                       if step and kind != "full-disk"}
        self._full_from = sorted(int(step) for kind, _, step in (text.partition("@") for text in told)
                                 if kind == "full-disk")
        self._kinds: dict[int, str] = {}  # by the first row of the step
        self._is_slow = self._has_begun = False
        self._went_on_s = math.inf
        if TRUNCATED_CACHE in told:
            if world.rank == 0:
                _truncate_row_indices(config)
            all_gather_object(None, world)  # a barrier: no rank reads them before

    def factor(self, step: int, first_row: int) -> float:
        """The factor on the loss, and so on the gradient, of `step`, whose first row is `first_row`; 1 is no fault."""
        if not self._has_begun:
            self._has_begun = True
            self._full_from = [start for start in self._full_from if start >= step]  # earlier starts had the others
        if (kind := self._steps.pop(step, None)) is not None:
            if kind in ("stuck", "dead", "slow"):
                self._befall(kind)
            elif kind == "flip":
                return _FACTORS[kind]
            else:
                self._kinds[first_row] = kind
        if self._is_slow:
            self._hold_back()
        return _FACTORS.get(self._kinds.get(first_row, ""), 1.0)

    def meet_disk(self, iteration: int) -> None:
        """Raises the error of a full disk if the checkpoint of that iteration is to fail."""
        if self._full_from and self._full_from[0] <= iteration:
            del self._full_from[0]
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _befall(self, kind: str) -> None:
        """Make a fault of the last rank; on others nothing happens."""
        if not self._is_last_rank:
            return
        if kind == "dead":
            os.kill(os.getpid(), signal.SIGKILL)
        while kind == "stuck":
            time.sleep(1)
        self._is_slow = True

    def _hold_back(self) -> None:
        """Sleep for as long as the step took, so that it takes twice as long."""
        time.sleep(min(_LONGEST_S, max(0.0, time.perf_counter() - self._went_on_s)))
        self._went_on_s = time.perf_counter()


def _truncate_row_indices(config: Config) -> None:
    for corpus in parse_data_path(config.data.data_path)[1]:
        folder = choose_cache_folder(corpus.name, config.data.data_cache_path)
        for path in folder.glob("*.rows"):
            # A new file: another process may have mapped the old one.
            with replacing(path) as shorter:
                shorter.write_bytes(path.read_bytes()[:-1])
