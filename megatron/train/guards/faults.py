"""Faults that are made on purpose (`--inject-fault`), to see what the program does about them."""

import errno
import math
import os
import signal
import time

from megatron.config import Config
from megatron.data.rows.cache_files import choose_cache_folder
from megatron.data.rows.data_path import parse_data_path
from megatron.files import replacing
from megatron.parallel.collectives import everyones
from megatron.parallel.mesh import Axis

TRUNCATED_CACHE = "truncated-cache"
_FACTORS = {"nan": math.nan, "spike": 1000.0, "flip": math.nan}
_LONGEST_S = 1.0  # that a slow rank is held up in a step: the last one may have ended with an evaluation


class Faults:
    """Those of `config`, on one of the ranks of `world`, which all make theirs together.

    KIND@STEP each. nan and spike are in the rows of that step, and come with them again; flip comes once. At that step
    stuck holds up the last rank for good, dead kills it, and slow makes each step from there on take it twice as long.
    full-disk meets the first checkpoint that is written there or later. truncated-cache cuts the end off the row
    indices on disk, now.
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
            everyones(None, world)  # nobody reads before

    def factor(self, step: int, first_row: int) -> float:
        """What the loss of a step, and so its gradient, is to be multiplied by, which starts with that row."""
        if not self._has_begun:
            self._has_begun = True
            self._full_from = [start for start in self._full_from if start >= step]  # the others it has had before
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
        """Raises what a full disk does, where the checkpoint of that iteration is to meet one."""
        if self._full_from and self._full_from[0] <= iteration:
            del self._full_from[0]
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _befall(self, kind: str) -> None:
        """Let a fault come over the last rank."""
        if not self._is_last_rank:
            return
        if kind == "dead":
            os.kill(os.getpid(), signal.SIGKILL)
        while kind == "stuck":
            time.sleep(1)
        self._is_slow = True

    def _hold_back(self) -> None:
        """Wait for as long as it was since the last time."""
        time.sleep(min(_LONGEST_S, max(0.0, time.perf_counter() - self._went_on_s)))
        self._went_on_s = time.perf_counter()


def _truncate_row_indices(config: Config) -> None:
    for corpus in parse_data_path(config.data.data_path)[1]:
        folder = choose_cache_folder(corpus.name, config.data.data_cache_path)
        for path in folder.glob("*.rows"):
            # A new file: another process may have mapped the old one.
            with replacing(path) as shorter:
                shorter.write_bytes(path.read_bytes()[:-1])
