"""How sure a measure is: the percentile bootstrap (Efron, 1979), which measures draws of the cases with replacement."""

from collections.abc import Iterator, Sequence

import numpy as np

CONFIDENCE = 0.95


def draws(num_cases: int, num_draws: int) -> Iterator[np.ndarray]:
    """Draws of as many cases as there are, by their numbers, int64 [cases] each; always the same."""
    generator = np.random.default_rng(0)
    for _ in range(num_draws):
        yield generator.integers(num_cases, size=num_cases)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The ends of the interval of CONFIDENCE, from the measure of each draw; a draw in which it is NaN is left out.

    NaN where no draw has one.
    """
    defined = [value for value in values if not np.isnan(value)]
    if not defined:
        return np.nan, np.nan
    low, high = np.quantile(defined, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
