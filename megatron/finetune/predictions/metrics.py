"""The metrics of tasks as the field reports them, computed from predictions on the host.

Every function takes the true values first. `measure` computes all metrics of a kind of labels, those in
`tasks.METRICS` and, for classes with probabilities, those of `ranking`, with bootstrap intervals on request. Shapes: n
proteins or labels, c classes, r residues.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron.finetune.data.contacts import pairs_in
from megatron.finetune.data.labels import LabelSpace
from megatron.finetune.data.tasks import CLASS, CLASSES, CONTACTS, ERRORS, METRICS, NUMBER, NUMBERS
from megatron.finetune.predictions.ranking import ranking_measures
from megatron.infer.bootstrap import draws, interval
from megatron.infer.contacts.precision import DIVISORS, RANGES, precisions
from megatron.infer.spearman import spearman
from megatron.kernels.packed_sequence import NO_TARGET

REACHES = {name: RANGES[name] for name in ("short", "medium", "long")} | {"medium_long": (12, None)}
_THRESHOLDS = np.arange(1, 100) / 100
Statistic = Callable[[np.ndarray], dict[str, float]]
_Shares = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Measured:
    """The value of a metric and the ends of its interval; NaN if no interval was asked for."""

    value: float
    low: float
    high: float


def measure(space: LabelSpace, true: Sequence[Any], predicted: Sequence[Any], *,
            probabilities: Sequence[np.ndarray] | None = None, num_draws: int = 0) -> dict[str, Measured]:
    """All metrics of a kind of labels on some proteins, by name.

    true: labels as `LabelSpace.read` returns them. predicted, for each protein: number, a float; class, the class;
    classes, a probability of each [c]; residues, the class of each residue [r]; numbers, one for each residue [r];
    contacts, a score of each pair [r, r]. If predictions cover only the first residues, the others do not count. All
    residues have the same weight, whatever their protein. `probabilities`, for the kind class: those of all classes [c]
    for each protein; without them there are no metrics of `ranking`. `num_draws`: number of bootstrap resamples of the
    proteins for the percentile interval (`infer.bootstrap`); resamples for which a metric is undefined are left out.
    """
    statistic = _statistic(space, true, predicted, probabilities)
    values = statistic(np.arange(len(true)))
    of_draws = [statistic(chosen) for chosen in draws(len(true), num_draws)]
    return {name: Measured(values[name], *interval([of_draw[name] for of_draw in of_draws]))
            for name in values}


def standing(measures: Mapping[str, Measured], first: str) -> tuple[float, ...]:
    """What evaluations are compared by, larger is better: the metric `first`, then the others in order, which decide
    among equals. An undefined metric is -inf.
    """
    values = {name: -one.value if name in ERRORS else one.value for name, one in measures.items()}
    ordered = [values[first], *(value for name, value in values.items() if name != first)]
    return tuple(-np.inf if np.isnan(value) else value for value in ordered)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The mean over seeds and its standard deviation (of a sample: divided by n − 1); NaN for a single seed."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else np.nan


def with_spread(values: Sequence[float], digits: int = 3, form: str = "") -> str:
    """Text such as `0.712 ± 0.004`, without a spread if there is only one value, in a form such as `.4g` or else with
    so many decimals.
    """
    mean, deviation = spread(values)
    form = form or f".{digits}f"
    return f"{mean:{form}}" + ("" if np.isnan(deviation) else f" ± {deviation:{form}}")


def form_of(name: str, digits: int = 3) -> str:
    """How a value of this metric is formatted: with so many decimals, or, on the scale of labels, four digits."""
    return ".4g" if name in ERRORS else f".{digits}f"


def pearson(true_n: np.ndarray, predicted_n: np.ndarray) -> float:
    """Pearson's correlation; NaN where either is constant."""
    x, y = (np.asarray(values, dtype=np.float64) for values in (true_n, predicted_n))
    if len(x) < 2 or (x == x[0]).all() or (y == y[0]).all():
        return np.nan
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def contact_precision(table: np.ndarray, scores_rr: np.ndarray) -> dict[str, float]:
    """The precisions of `infer.contacts.precision` for each of REACHES, named REACH_p_at_l, _l2 and _l5.

    `table`: the true contacts, as in `data.contacts`. Scores are made symmetric first. L is the number of residues,
    including unresolved ones, whose pairs do not count.
    """
    pairs = pairs_in(table)
    scores_p = torch.from_numpy(scores_rr + scores_rr.T)[pairs.first_p, pairs.second_p]
    found = precisions(scores_p, pairs, len(table), REACHES)
    return {f"{reach}_p_at_l{divisor if divisor > 1 else ''}": float(found[row, column])
            for row, reach in enumerate(REACHES) for column, divisor in enumerate(DIVISORS)}


def _statistic(space: LabelSpace, true: Sequence[Any], predicted: Sequence[Any],
               probabilities: Sequence[np.ndarray] | None = None) -> Statistic:
    """A function that computes the metrics of some of the proteins, given by index."""
    if space.kind == NUMBER:
        true_n, predicted_n = (np.array(values, dtype=np.float64) for values in (true, predicted))
        return lambda chosen: _of_numbers(true_n[chosen], predicted_n[chosen])
    if space.kind == NUMBERS:
        return _of_numbers_of_residues(true, predicted)
    if space.kind == CLASS:
        return _of_class(np.array(true), np.array(predicted), probabilities)
    if space.kind == CLASSES:
        return _of_several(np.array(true, dtype=bool), np.array(predicted))
    if space.kind == CONTACTS:
        names = METRICS[CONTACTS]
        found = [contact_precision(table[:len(scores_rr)], scores_rr)
                 for table, scores_rr in zip(true, predicted, strict=True)]
        values = np.array([[one[name] for name in names] for one in found]).reshape(-1, len(names))
        return lambda chosen: dict(zip(names, map(_mean, values[chosen].T), strict=True))
    seen = [(labels[:len(classes)], np.asarray(classes)) for labels, classes in zip(true, predicted, strict=True)]
    counts_n3c = np.array([_counts(labels[labels != NO_TARGET], classes[labels != NO_TARGET], len(space.class_names))
                           for labels, classes in seen])
    return lambda chosen: _of_classes(_sum(_times(chosen, len(counts_n3c)), counts_n3c))


def _of_numbers(true_n: np.ndarray, predicted_n: np.ndarray) -> dict[str, float]:
    errors_n = true_n - predicted_n
    return {"spearman": spearman(true_n, predicted_n), "pearson": pearson(true_n, predicted_n),
            "mse": _mean(errors_n**2), "mae": _mean(np.abs(errors_n))}


def _of_classes(counts_3c: np.ndarray) -> dict[str, float]:
    """The metrics that follow from the counts of `_counts`."""
    return {"accuracy": _accuracy(counts_3c), "mcc": _mcc(counts_3c), "f1_macro": _f1_macro(counts_3c)}


def _of_class(true_n: np.ndarray, predicted_n: np.ndarray, probabilities: Sequence[np.ndarray] | None) -> Statistic:
    """A function that computes the metrics of some proteins with one class each."""
    if probabilities is None or not len(true_n):
        return lambda chosen: _of_classes(_counts(true_n[chosen], predicted_n[chosen]))
    ranking = ranking_measures(true_n, np.array(probabilities))
    return lambda chosen: {**_of_classes(_counts(true_n[chosen], predicted_n[chosen])),
                           **ranking(_times(chosen, len(true_n)))}


def _of_numbers_of_residues(true: Sequence[np.ndarray], predicted: Sequence[np.ndarray]) -> Statistic:
    """A function that computes the metrics over all residues that count of some proteins, each with the same weight."""
    counted = [~np.isnan(numbers[:len(found)]) for numbers, found in zip(true, predicted, strict=True)]
    pairs = [np.array([numbers[:len(found)][is_counted], found[is_counted]], dtype=np.float64)
             for numbers, found, is_counted in zip(true, predicted, counted, strict=True)]
    return lambda chosen: _of_numbers(*np.concatenate([pairs[number] for number in chosen], axis=1))


def _of_several(true_nc: np.ndarray, scores_nc: np.ndarray) -> Statistic:
    """The metrics for several classes per protein; F1 is over classes with a probability of at least one half."""
    shares = _precisions_and_recalls(true_nc, scores_nc)
    is_chosen_nc = scores_nc >= 0.5
    counts_n3c = np.stack([true_nc, is_chosen_nc, true_nc & is_chosen_nc], axis=1).astype(np.float64)

    def measures(chosen: np.ndarray) -> dict[str, float]:
        times_n = _times(chosen, len(true_nc))
        counts_3c = _sum(times_n, counts_n3c)
        return {"f1_max": _f1_max(*shares, times_n),
                "f1_micro": _f1_macro(counts_3c.sum(axis=1, keepdims=True)), "f1_macro": _f1_macro(counts_3c)}

    return measures


def _times(chosen: np.ndarray, num_proteins: int) -> np.ndarray:
    """How often each protein is in a resample, float64 [n]. A sum over the resample is a product with this, without
    copies.
    """
    return np.bincount(chosen, minlength=num_proteins).astype(np.float64)


def _sum(times_n: np.ndarray, counts_n3c: np.ndarray) -> np.ndarray:
    return np.tensordot(times_n, counts_n3c, 1)


def _precisions_and_recalls(true_nc: np.ndarray, scores_nc: np.ndarray) -> tuple[_Shares, _Shares]:
    """Each protein's precision and recall at h thresholds, and 1 where it is defined; each pair is float64 [h, n].

    Undefined values (nothing predicted, or nothing true) are 0.
    """
    right_hn = np.array([(true_nc & (scores_nc >= threshold)).sum(axis=1) for threshold in _THRESHOLDS])
    chosen_hn = np.array([(scores_nc >= threshold).sum(axis=1) for threshold in _THRESHOLDS])
    true_hn = np.broadcast_to(true_nc.sum(axis=1), right_hn.shape)
    precisions, recalls = ((np.divide(right_hn, whole_hn, out=np.zeros(right_hn.shape), where=whole_hn > 0),
                            (whole_hn > 0).astype(np.float64)) for whole_hn in (chosen_hn, true_hn))
    return precisions, recalls


def _f1_max(precisions: _Shares, recalls: _Shares, times_n: np.ndarray) -> float:
    """CAFA's F-max (Radivojac et al., 2013, doi 10.1038/nmeth.2340), over thresholds from 0.01 to 0.99.

    Precision is averaged over proteins with a prediction, recall over those with a label, each weighted by `times_n`;
    NaN if no protein has a label.
    """
    if not (recalls[1] @ times_n).any():
        return np.nan
    precision_h, recall_h = (shares_hn @ times_n / np.maximum(is_there_hn @ times_n, 1)
                             for shares_hn, is_there_hn in (precisions, recalls))
    return float((2 * precision_h * recall_h / np.maximum(precision_h + recall_h, 1e-300)).max())


def _counts(true_n: np.ndarray, predicted_n: np.ndarray, num_classes: int = 0) -> np.ndarray:
    """How often each class is true, predicted, and both, float64 [3, c], in which products are exact to 2^53."""
    true_n, predicted_n = np.asarray(true_n), np.asarray(predicted_n)
    size = max(int(max(true_n.max(initial=0), predicted_n.max(initial=0))) + 1, num_classes)
    return np.array([np.bincount(values, minlength=size) for values in
                     (true_n, predicted_n, true_n[true_n == predicted_n])], dtype=np.float64)


def _accuracy(counts_3c: np.ndarray) -> float:
    """The share that is correct; NaN if there are no labels."""
    return float(counts_3c[2].sum() / counts_3c[0].sum()) if counts_3c[0].any() else np.nan


def _mcc(counts_3c: np.ndarray) -> float:
    """Matthews' correlation for any number of classes (Gorodkin, 2004, doi 10.1016/j.compbiolchem.2004.09.006).

    0 if all true, or all predicted, labels are of one class.
    """
    true_c, predicted_c, right_c = counts_3c
    total = true_c.sum()
    product = (total * total - true_c @ true_c) * (total * total - predicted_c @ predicted_c)
    return float((right_c.sum() * total - true_c @ predicted_c) / np.sqrt(product)) if product else 0.0


def _f1_macro(counts_3c: np.ndarray) -> float:
    """The mean F1 over the classes that occur among the true or the predicted labels."""
    true_c, predicted_c, right_c = counts_3c[:, counts_3c.any(axis=0)]
    return _mean(2 * right_c / (true_c + predicted_c))


def _mean(values: np.ndarray) -> float:
    """The mean of the values that are not NaN; NaN if there are none."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else np.nan
