"""Precision of predicted contacts: P@L, P@L/2 and P@L/5, by ranges of separation in the sequence.

P@L is the share of true contacts among the L highest-scored pairs of a protein of L residues. Shapes: p pairs, q
proteins.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron.infer.bootstrap import draws, interval
from megatron.infer.contacts.chains import LEAST_SEPARATION, Pairs

Ranges = Mapping[str, tuple[int, int | None]]
# As in CASP: the least separation in each range, and the first beyond it.
RANGES: Ranges = {"short": (LEAST_SEPARATION, 12), "medium": (12, 24), "long": (24, None),
                  "all": (LEAST_SEPARATION, None)}
DIVISORS = (1, 2, 5)  # of L, for the number of pairs taken
_RESAMPLES = 2000


def precisions(scores_p: Tensor, pairs: Pairs, length: int, ranges: Ranges = RANGES) -> np.ndarray:
    """The precision among the L, L/2 and L/5 highest-scored pairs of each range, [4, 3] for `ranges` by DIVISORS.

    L is `length`. If there are fewer pairs, all count; NaN if there are none. Ties are broken at random, by a fixed
    seed.
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
    """The mean over proteins, without NaNs, and the ends of its 95 % bootstrap percentile interval; NaN if all are NaN.
    """
    known = np.array([value for value in values_q if not np.isnan(value)])
    if not len(known):
        return np.nan, np.nan, np.nan
    return float(known.mean()), *interval([known[drawn].mean() for drawn in draws(len(known), _RESAMPLES)])
