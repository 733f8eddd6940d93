"""Faults that are made on purpose (`--inject-fault`), to see what the program does about them."""

import math
import time
from collections.abc import Sequence

_FACTORS = {"nan": math.nan, "spike": 1000.0, "flip": math.nan}


class Faults:
    """`told`: KIND@STEP each. nan and spike are in the rows of that step, and come with them again; flip comes once.

    stuck holds up a rank at that step for good, where it is the last.
    """

    def __init__(self, told: Sequence[str], is_last_rank: bool) -> None:
        self._is_last_rank = is_last_rank
        self._steps = {int(step): kind for kind, step in (text.split("@") for text in told)}
        self._kinds: dict[int, str] = {}  # by the first row of the step

    def factor(self, step: int, first_row: int) -> float:
        """What the loss of a step, and so its gradient, is to be multiplied by, which starts with that row."""
        if (kind := self._steps.pop(step, None)) is not None:
            if kind == "stuck" and self._is_last_rank:
                _hold_up()
            if kind == "flip":
                return _FACTORS[kind]
            self._kinds[first_row] = kind
        return _FACTORS.get(self._kinds.get(first_row, ""), 1.0)


def _hold_up() -> None:
    while True:
        time.sleep(1)
