"""How well a task is done, as the field reports it, from predictions that were gathered to the host.

Every function takes what is true first. `measure` gives all measures of a kind of labels by name, as `tasks.METRICS`
lists them, with an interval where asked. Shapes: n proteins or labels, c classes, r residues.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.finetune.labels import LabelSpace
from megatron.finetune.tasks import CLASS, CLASSES, CONTACTS, CUTOFF_ANGSTROM, LEAST_SEPARATION, METRICS, NUMBER
from megatron.kernels.packed_sequence import NO_TARGET

# The least separation in the sequence, and what it is below.
REACHES = {"short": (LEAST_SEPARATION, 12), "medium": (12, 24), "long": (24, None), "medium_long": (12, None)}
DIVISORS = {"l": 1, "l2": 2, "l5": 5}  # of a protein's length: as many pairs are predicted
_THRESHOLDS = np.arange(1, 100) / 100
Statistic = Callable[[np.ndarray], dict[str, float]]


@dataclass(frozen=True)
class Measured:
    """A measure, and the ends of its interval; NaN where none was asked for."""

    value: float
    low: float = np.nan
    high: float = np.nan


def measure(space: LabelSpace, true: Sequence[Any], predicted: Sequence[Any], *, num_draws: int = 0,
            level: float = 0.95, seed: int = 0) -> dict[str, Measured]:
    """The measures of a kind of labels on some proteins, by name.

    true: labels as `LabelSpace.read` gives them. predicted, for each protein: number, a float; class, the class;
    classes, a probability of each [c]; residues, the class of each residue [r]; contacts, a score of each pair [r, r].
    Where these are of the first residues alone, the others do not count. Residues count alike, whatever their protein.
    With `num_draws` the interval is that of so many draws of as many proteins, with replacement (the percentile
    bootstrap; Efron, 1979); draws in which a measure is not defined are left out.
    """
    statistic, everything = _statistic(space, true, predicted), np.arange(len(true))
    values = statistic(everything)
    if not num_draws:
        return {name: Measured(values[name]) for name in METRICS[space.kind]}
    rng = np.random.default_rng(seed)
    draws = [statistic(rng.integers(len(true), size=len(true))) for _ in range(num_draws)]
    ends = [(1 - level) / 2, (1 + level) / 2]
    return {name: Measured(values[name], *_quantiles([draw[name] for draw in draws], ends))
            for name in METRICS[space.kind]}


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The mean over seeds and its standard deviation (of a sample: over n − 1); NaN for one seed."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else np.nan


def with_spread(values: Sequence[float], digits: int = 3) -> str:
    """`0.712 ± 0.004`, or without a spread where there is one value."""
    mean, deviation = spread(values)
    return f"{mean:.{digits}f}" + ("" if np.isnan(deviation) else f" ± {deviation:.{digits}f}")


def spearman(true_n: np.ndarray, predicted_n: np.ndarray) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank; NaN where either is constant."""
    return pearson(_ranks(np.asarray(true_n)), _ranks(np.asarray(predicted_n)))


def pearson(true_n: np.ndarray, predicted_n: np.ndarray) -> float:
    """Pearson's correlation; NaN where either is constant."""
    x, y = (np.asarray(values, dtype=np.float64) for values in (true_n, predicted_n))
    if len(x) < 2 or (x == x[0]).all() or (y == y[0]).all():
        return np.nan
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def accuracy(true_n: np.ndarray, predicted_n: np.ndarray) -> float:
    """The share that is right."""
    return float(np.mean(np.asarray(true_n) == np.asarray(predicted_n))) if len(true_n) else np.nan


def mcc(true_n: np.ndarray, predicted_n: np.ndarray) -> float:
    """Matthews' correlation for any number of classes (Gorodkin, 2004, doi 10.1016/j.compbiolchem.2004.09.006).

    0 where either is of one class alone.
    """
    true_c, predicted_c, right_c = _counts(true_n, predicted_n)
    total = true_c.sum()
    covariances = [total * total - first @ second for first, second in
                   ((true_c, true_c), (predicted_c, predicted_c))]
    product = covariances[0] * covariances[1]
    return float((right_c.sum() * total - true_c @ predicted_c) / np.sqrt(product)) if product else 0.0


def f1_macro(true_n: np.ndarray, predicted_n: np.ndarray) -> float:
    """The mean over the classes that are true or predicted somewhere of the harmonic mean of precision and recall."""
    true_c, predicted_c, right_c = _counts(true_n, predicted_n)
    occurs_c = true_c + predicted_c > 0
    return float((2 * right_c[occurs_c] / (true_c + predicted_c)[occurs_c]).mean()) if occurs_c.any() else np.nan


def f1_max(true_nc: np.ndarray, scores_nc: np.ndarray) -> float:
    """CAFA's F-max (Radivojac et al., 2013, doi 10.1038/nmeth.2340), over thresholds from 0.01 to 0.99.

    Precision is the mean over proteins with a prediction, recall over those with a label.
    """
    true_nc, scores_nc = np.asarray(true_nc, dtype=bool), np.asarray(scores_nc)
    num_true_n = true_nc.sum(axis=1)
    if not num_true_n.any():
        return np.nan
    best = 0.0
    for threshold in _THRESHOLDS:
        is_chosen_nc = scores_nc >= threshold
        right_n, chosen_n = (is_chosen_nc & true_nc).sum(axis=1), is_chosen_nc.sum(axis=1)
        if right_n.any():
            precision = (right_n[chosen_n > 0] / chosen_n[chosen_n > 0]).mean()
            recall = (right_n[num_true_n > 0] / num_true_n[num_true_n > 0]).mean()
            best = max(best, float(2 * precision * recall / (precision + recall)))
    return best


def contact_precision(atoms_r3: np.ndarray, scores_rr: np.ndarray) -> dict[str, float]:
    """The shares of contacts among the L, L/2 and L/5 pairs of the highest scores, for each of REACHES.

    Scores are made symmetric. L is the number of residues, unresolved ones too, whose pairs do not count; where there
    are fewer pairs than are to be predicted, all are; NaN where there is none. Equal scores rank at random, the same
    way each time.
    """
    length = len(atoms_r3)
    first_p, second_p = np.triu_indices(length, LEAST_SEPARATION)
    distances_p = np.linalg.norm(atoms_r3[first_p] - atoms_r3[second_p], axis=1)
    order_p = np.random.default_rng(0).permutation(len(first_p))
    order_p = order_p[~np.isnan(distances_p[order_p])]
    scores_p = (scores_rr[first_p, second_p] + scores_rr[second_p, first_p])[order_p]
    ranked_p = order_p[np.argsort(-scores_p, kind="stable")]
    touches_p, separations_p = distances_p[ranked_p] < CUTOFF_ANGSTROM, (second_p - first_p)[ranked_p]
    found = {}
    for reach, (least, below) in REACHES.items():
        touches = touches_p[(separations_p >= least) & (separations_p < (below or np.inf))]
        for name, divisor in DIVISORS.items():
            taken = touches[:max(1, length // divisor)]
            found[f"{reach}_p_at_{name}"] = float(taken.mean()) if len(taken) else np.nan
    return found


def _statistic(space: LabelSpace, true: Sequence[Any], predicted: Sequence[Any]) -> Statistic:
    """The measures of some of the proteins, by their numbers."""
    if space.kind == NUMBER:
        return _on_arrays(np.array(true, dtype=np.float64), np.array(predicted, dtype=np.float64), {
            "spearman": spearman, "pearson": pearson,
            "mse": lambda x, y: float(np.mean((x - y) ** 2)), "mae": lambda x, y: float(np.mean(np.abs(x - y)))})
    of_classes = {"accuracy": accuracy, "mcc": mcc, "f1_macro": f1_macro}
    if space.kind == CLASS:
        return _on_arrays(np.array(true), np.array(predicted), of_classes)
    if space.kind == CLASSES:
        return _on_arrays(np.array(true, dtype=bool), np.array(predicted), {
            "f1_max": f1_max, "f1_micro": _f1_micro_of_several, "f1_macro": _f1_macro_of_several})
    if space.kind == CONTACTS:
        names = METRICS[CONTACTS]
        found = [contact_precision(atoms_r3[:len(scores_rr)], scores_rr)
                 for atoms_r3, scores_rr in zip(true, predicted, strict=True)]
        table = np.array([[one[name] for name in names] for one in found]).reshape(-1, len(names))
        return lambda chosen: dict(zip(names, map(_mean, table[chosen].T), strict=True))
    seen = [(labels[:len(classes)], np.asarray(classes)) for labels, classes in zip(true, predicted, strict=True)]
    pairs = [(labels[labels != NO_TARGET], classes[labels != NO_TARGET]) for labels, classes in seen]

    def of_residues(chosen: np.ndarray) -> dict[str, float]:
        true_n, predicted_n = (np.concatenate([pairs[number][side] for number in chosen]) for side in (0, 1))
        return {name: function(true_n, predicted_n) for name, function in of_classes.items()}

    return of_residues


def _on_arrays(true: np.ndarray, predicted: np.ndarray,
               functions: Mapping[str, Callable[[np.ndarray, np.ndarray], float]]) -> Statistic:
    return lambda chosen: {name: function(true[chosen], predicted[chosen]) for name, function in functions.items()}


def _f1_micro_of_several(true_nc: np.ndarray, scores_nc: np.ndarray) -> float:
    """F1 of all proteins' classes together, those with a probability of a half or more being predicted."""
    chosen_nc = scores_nc >= 0.5
    total = true_nc.sum() + chosen_nc.sum()
    return float(2 * (true_nc & chosen_nc).sum() / total) if total else np.nan


def _f1_macro_of_several(true_nc: np.ndarray, scores_nc: np.ndarray) -> float:
    """The mean of each class's F1 at a half, over the classes that are true or predicted somewhere."""
    chosen_nc = scores_nc >= 0.5
    total_c = true_nc.sum(axis=0) + chosen_nc.sum(axis=0)
    return _mean(2 * (true_nc & chosen_nc).sum(axis=0)[total_c > 0] / total_c[total_c > 0])


def _counts(true_n: np.ndarray, predicted_n: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How often each class is true, predicted, and both; float64 [c], in which products are exact to 2^53."""
    true_n, predicted_n = np.asarray(true_n), np.asarray(predicted_n)
    size = int(max(true_n.max(initial=0), predicted_n.max(initial=0))) + 1
    right_n = true_n[true_n == predicted_n]
    true_c, predicted_c, right_c = (np.bincount(values, minlength=size).astype(np.float64)
                                    for values in (true_n, predicted_n, right_n))
    return true_c, predicted_c, right_c


def _ranks(values_n: np.ndarray) -> np.ndarray:
    """The rank of each value, from 1; equal ones share their mean rank."""
    _, group_n, sizes = np.unique(values_n, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[group_n]


def _mean(values: np.ndarray) -> float:
    """The mean of those that are defined; NaN where none is."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else np.nan


def _quantiles(values: Sequence[float], ends: Sequence[float]) -> list[float]:
    defined = [value for value in values if not np.isnan(value)]
    return [float(end) for end in np.quantile(defined, ends)] if defined else [np.nan, np.nan]
