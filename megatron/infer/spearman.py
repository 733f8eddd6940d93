"""Spearman's rank correlation (ties have their mean rank) and its bootstrap interval."""

import math

import numpy as np

from megatron.infer.bootstrap import draws, interval

_RESAMPLES = 1000


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """The rank correlation of two arrays [n]; nan if one of them is constant or contains a nan."""
    if np.isnan(first).any() or np.isnan(second).any():
        return math.nan
    return _weighted(_groups(first), _groups(second), np.ones(len(first)))


def spearman_interval(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """The percentile bootstrap interval of the correlation, resampling pairs; nan if there is none.

    A resample is stored as how often each pair was drawn, so ranks need no new sorting.
    """
    groups, number = (_groups(first), _groups(second)), len(first)
    return interval([_weighted(*groups, np.bincount(drawn, minlength=number).astype(float))
                     for drawn in draws(number, _RESAMPLES)])


def _groups(values: np.ndarray) -> np.ndarray:
    """The index of each value among the distinct values in ascending order."""
    return np.unique(values, return_inverse=True)[1]


def _weighted(first: np.ndarray, second: np.ndarray, counts: np.ndarray) -> float:
    """The correlation where pair i occurs `counts[i]` times."""
    total = counts.sum()
    one, other = (_ranks(groups, counts) - (total + 1) / 2 for groups in (first, second))
    scale = math.sqrt(float(counts @ one**2) * float(counts @ other**2))
    return float(counts @ (one * other)) / scale if scale > 0 else math.nan


def _ranks(groups: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean ranks from 1: those below, and half of the equal ones."""
    sizes = np.bincount(groups, weights=counts)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[groups]
