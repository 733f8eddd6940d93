"""How well probabilities rank the proteins of a class before the others: the areas under two curves.

Equal probabilities count as one threshold. Shapes: n proteins, c classes that are measured.
"""

from collections.abc import Callable

import numpy as np


def ranking_measures(true_n: np.ndarray, scores_nc: np.ndarray) -> Callable[[np.ndarray], dict[str, float]]:
    """A function that computes the measures where protein i occurs `times_n[i]` times, so that a resample needs no new
    sorting.

    true_n: the class of each protein; scores_nc: its probability of each of all classes. For two classes `auroc` and
    `average_precision` are those of the second one. For more, `auroc` is the mean over the classes that occur, each
    against the others, and there is no average precision. NaN where there is no class with proteins inside and outside.
    """
    has_two = scores_nc.shape[1] == 2
    classes_c = np.array([1]) if has_two else np.unique(true_n)
    is_true_cn = true_n == classes_c[:, None]
    # The place of each probability among the different ones of its class; each class has n places of its own.
    places_cn = np.array([np.unique(scores_nc[:, one], return_inverse=True)[1] for one in classes_c], dtype=np.int64)
    places_cn = places_cn.reshape(is_true_cn.shape) + np.arange(len(classes_c))[:, None] * len(true_n)

    def measures(times_n: np.ndarray) -> dict[str, float]:
        all_cg, right_cg = (np.bincount(places_cn.ravel(), weights_cn.ravel(), places_cn.size).reshape(places_cn.shape)
                            for weights_cn in (np.broadcast_to(times_n, is_true_cn.shape), times_n * is_true_cn))
        found = {"auroc": _auroc(right_cg, all_cg - right_cg)}
        return found | ({"average_precision": _average_precision(right_cg[0], all_cg[0])} if has_two else {})

    return measures


def _auroc(right_cg: np.ndarray, wrong_cg: np.ndarray) -> float:
    """The mean over classes of the share of pairs, one protein of the class and one of the others, in which the first
    has the higher probability; equal ones count half. Given are numbers of proteins by ascending probability.
    """
    pairs_c = right_cg.sum(axis=1) * wrong_cg.sum(axis=1)
    won_c = (right_cg * (np.cumsum(wrong_cg, axis=1) - wrong_cg / 2)).sum(axis=1)
    return float(np.mean(won_c[pairs_c > 0] / pairs_c[pairs_c > 0])) if pairs_c.any() else np.nan


def _average_precision(right_g: np.ndarray, all_g: np.ndarray) -> float:
    """The mean precision at the probability of each protein of the class; NaN if there is none.

    Given are numbers of proteins by ascending probability.
    """
    if not right_g.any():
        return np.nan
    precision_g = np.cumsum(right_g[::-1]) / np.maximum(np.cumsum(all_g[::-1]), 1)
    return float(right_g[::-1] @ precision_g / right_g.sum())
