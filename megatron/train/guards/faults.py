"""Faults that are made on purpose (`--inject-fault`), to see what the program does about them."""

import math
from collections.abc import Sequence

_FACTORS = {"nan": math.nan, "spike": 1000.0, "flip": math.nan}


class Faults:
    """`told`: KIND@STEP each. nan and spike are in the rows of that step, and come with them again; flip comes once."""

    def __init__(self, told: Sequence[str]) -> None:
        self._steps = {int(step): kind for kind, step in (text.split("@") for text in told)}
        self._kinds: dict[int, str] = {}  # by the first row of the step

    def factor(self, step: int, first_row: int) -> float:
        """What the loss of a step, and so its gradient, is to be multiplied by, which starts with that row."""
        if (kind := self._steps.pop(step, None)) is not None:
            if kind == "flip":
                return _FACTORS[kind]
            self._kinds[first_row] = kind
        return _FACTORS.get(self._kinds.get(first_row, ""), 1.0)
