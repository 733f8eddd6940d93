"""How many of the pairs that are told first do touch: P@L, P@L/2, P@L/5, by how far apart they are in the sequence.

Shapes: p pairs, q proteins.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron.infer.bootstrap import draws, interval
from megatron.infer.contacts.chains import LEAST_SEPARATION, Pairs

Ranges = Mapping[str, tuple[int, int | None]]
# As CASP has it: the least separation of a range, and the first that is beyond it.
RANGES: Ranges = {"short": (LEAST_SEPARATION, 12), "medium": (12, 24), "long": (24, None),
                  "all": (LEAST_SEPARATION, None)}
DIVISORS = (1, 2, 5)  # of the residues: as many pairs are told
_RESAMPLES = 2000


def precisions(scores_p: Tensor, pairs: Pairs, length: int, ranges: Ranges = RANGES) -> np.ndarray:
    """The shares of contacts among the L, L/2, L/5 pairs of the highest scores, [4, 3]: of the ranges by DIVISORS.

    L is `length`; where there are fewer pairs, among all; NaN where there are none. Equal scores rank at random.
    """
    order_p = torch.randperm(len(scores_p), generator=torch.Generator().manual_seed(0))
    found, separation_p = np.empty((len(ranges), len(DIVISORS))), pairs.second_p - pairs.first_p
    for row, (least, beyond) in enumerate(ranges.values()):
        is_there_p = (separation_p >= least) & (separation_p < (beyond or torch.inf))
        candidates = order_p[is_there_p[order_p]]
        ranked = pairs.touches_p[candidates[scores_p[candidates].argsort(descending=True, stable=True)]].float()
        found[row] = [float(ranked[:max(1, length // divisor)].mean()) for divisor in DIVISORS]
    return found


def mean_and_interval(values_q: Sequence[float]) -> tuple[float, float, float]:
    """The mean over proteins and the ends of its 95 % bootstrap interval (percentiles); NaN where no value is a number.
    """
    known = np.array([value for value in values_q if not np.isnan(value)])
    if not len(known):
        return np.nan, np.nan, np.nan
    return float(known.mean()), *interval([known[drawn].mean() for drawn in draws(len(known), _RESAMPLES)])
