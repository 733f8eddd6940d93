"""Metrics agree with scikit-learn, SciPy and their definitions; bootstrap intervals over proteins."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

from megatron.finetune.data.contacts import table_of_atoms
from megatron.finetune.data.labels import LabelSpace
from megatron.finetune.data.tasks import LABEL_KINDS, METRICS
from megatron.finetune.predictions import metrics
from megatron.kernels.packed_sequence import NO_TARGET


def space(kind, num_classes=0):
    return LabelSpace(kind, tuple(map(str, range(num_classes))))


@pytest.mark.parametrize("ties", [1, 10, 1000])
def test_correlations_are_scipys_with_ties(ties):
    rng = np.random.default_rng(ties)
    x = np.round(rng.normal(size=200) * ties) / ties
    y = np.round((x + rng.normal(size=200)) * ties) / ties
    assert metrics.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert metrics.pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)


def test_correlations_with_a_constant_are_not_defined():
    for values in (np.ones(5), np.full(5, 0.1)):
        assert np.isnan(metrics.spearman(values, np.arange(5)))
        assert np.isnan(metrics.pearson(np.arange(5), values))
    assert np.isnan(metrics.spearman(np.ones(1), np.ones(1)))


@pytest.mark.parametrize("num_classes", [2, 3, 40])
def test_measures_of_classes_are_scikit_learns(num_classes):
    rng = np.random.default_rng(num_classes)
    for share in (0.0, 0.3, 0.9):
        true = rng.integers(num_classes, size=60)
        predicted = np.where(rng.random(60) < share, true, rng.integers(num_classes, size=60))
        found = metrics.measure(space("class", num_classes), true, predicted)
        assert found["accuracy"].value == pytest.approx(sklearn_metrics.accuracy_score(true, predicted))
        assert found["mcc"].value == pytest.approx(sklearn_metrics.matthews_corrcoef(true, predicted))
        expected = sklearn_metrics.f1_score(true, predicted, average="macro")
        assert found["f1_macro"].value == pytest.approx(expected)
    assert metrics.measure(space("class", num_classes), true, np.zeros(60, dtype=int))["mcc"].value == 0


@pytest.mark.parametrize("digits", [1, 8])
def test_areas_under_curves_are_scikit_learns_with_ties(digits):
    rng = np.random.default_rng(digits)
    for num_classes in (2, 3, 20):
        true = np.append(np.arange(num_classes), rng.integers(num_classes, size=80))
        scores = np.round(rng.random((len(true), num_classes)) + 0.3 * np.eye(num_classes)[true], digits)
        scores /= scores.sum(axis=1, keepdims=True)
        found = metrics.measure(space("class", num_classes), true, scores.argmax(1), probabilities=list(scores))
        if num_classes > 2:
            expected = sklearn_metrics.roc_auc_score(true, scores, multi_class="ovr")
            assert "average_precision" not in found
        else:
            expected = sklearn_metrics.roc_auc_score(true, scores[:, 1])
            assert found["average_precision"].value == pytest.approx(
                sklearn_metrics.average_precision_score(true, scores[:, 1]))
        assert found["auroc"].value == pytest.approx(expected)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_areas_under_curves_of_a_resample_are_those_of_its_proteins(num_classes):
    rng = np.random.default_rng(num_classes)
    true, scores = rng.integers(num_classes, size=40), np.round(rng.random((40, num_classes)), 1)
    statistic = metrics._statistic(space("class", num_classes), true, scores.argmax(1), scores)
    for _ in range(20):
        drawn = rng.integers(40, size=12)
        found = metrics.measure(space("class", num_classes), true[drawn], scores[drawn].argmax(1),
                                probabilities=scores[drawn])
        assert statistic(drawn) == pytest.approx({name: one.value for name, one in found.items()})
    assert found["auroc"].value == pytest.approx(np.mean([
        sklearn_metrics.roc_auc_score(true[drawn] == one, scores[drawn, one])
        for one in ([1] if num_classes == 2 else np.unique(true[drawn]))]))


def test_areas_under_curves_are_not_defined_for_one_class_alone():
    found = metrics.measure(space("class", 2), [0, 0], [0, 0], probabilities=[np.array([.9, .1])] * 2, num_draws=5)
    for name in ("auroc", "average_precision"):
        assert np.isnan([found[name].value, found[name].low, found[name].high]).all()


def test_measures_of_several_classes_are_scikit_learns():
    rng = np.random.default_rng(0)
    true, scores = rng.random((40, 5)) < 0.3, rng.random((40, 5))
    found = metrics.measure(space("classes", 5), list(true), list(scores))
    for average in ("micro", "macro"):
        expected = sklearn_metrics.f1_score(true, scores >= 0.5, average=average)
        assert found[f"f1_{average}"].value == pytest.approx(expected)


def test_f_max_looks_at_no_threshold_below_one_percent():
    found = metrics.measure(space("classes", 2), [np.array([True, False])], [np.array([0.009, 0.009])])
    assert found["f1_max"].value == 0


def test_f_max_is_its_definition():
    rng = np.random.default_rng(1)
    true, scores = rng.random((12, 4)) < 0.4, rng.random((12, 4))
    best = 0.0
    for threshold in np.arange(1, 100) / 100:
        precisions = [np.mean(labels[row >= threshold]) for labels, row in zip(true, scores, strict=True)
                      if (row >= threshold).any()]
        recalls = [np.mean(row[labels] >= threshold) for labels, row in zip(true, scores, strict=True) if labels.any()]
        precision, recall = np.mean(precisions or [0]), np.mean(recalls)
        if precision + recall:
            best = max(best, 2 * precision * recall / (precision + recall))
    cases = [(true, scores), (true, true.astype(float)), (np.zeros((3, 2)), np.ones((3, 2)))]
    found = [metrics.measure(space("classes", labels.shape[1]), labels, rows)["f1_max"].value for labels, rows in cases]
    assert found == [pytest.approx(best), 1, pytest.approx(np.nan, nan_ok=True)]


def test_precision_of_contacts_is_its_definition():
    rng = np.random.default_rng(2)
    length = 60
    atoms = np.cumsum(rng.normal(scale=2.5, size=(length, 3)), axis=0).astype(np.float32)
    atoms[[7, 33]] = np.nan
    scores = rng.random((length, length))
    found = metrics.contact_precision(table_of_atoms(atoms), scores)
    reaches = {"short": (6, 12), "medium": (12, 24), "long": (24, 99), "medium_long": (12, 99)}
    for reach, (least, below) in reaches.items():
        pairs = [(scores[i, j] + scores[j, i], float(np.linalg.norm(atoms[i] - atoms[j]) < 8))
                 for i in range(length) for j in range(i + least, min(i + below, length)) if {i, j}.isdisjoint({7, 33})]
        touches = [touch for _, touch in sorted(pairs, reverse=True)]
        assert 0 < sum(touches) < len(touches)
        for name, number in (("l", 60), ("l2", 30), ("l5", 12)):
            assert found[f"{reach}_p_at_{name}"] == pytest.approx(np.mean(touches[:number]))


def test_contacts_of_a_short_chain_have_no_long_range():
    found = metrics.contact_precision(table_of_atoms(np.zeros((10, 3), np.float32)), np.zeros((10, 10)))
    assert np.isnan(found["long_p_at_l"])
    assert found["short_p_at_l5"] == 1
    chains = [table_of_atoms(np.zeros((length, 3), np.float32)) for length in (10, 30)]
    measured = metrics.measure(space("contacts"), chains, [np.zeros((n, n)) for n in (10, 30)], num_draws=20)
    assert measured["long_p_at_l5"].value == 1  # of the one that has any


def test_equal_scores_do_not_rank_by_place():
    """A chain whose first half touches itself alone: in the order of places a constant score would find it all."""
    atoms = np.zeros((200, 3), np.float32)
    atoms[100:, 0] = 100 * np.arange(100)
    found = metrics.contact_precision(table_of_atoms(atoms), np.zeros((200, 200)))["medium_long_p_at_l"]
    pairs = [(i, j) for i in range(200) for j in range(i + 12, 200)]
    share = np.mean([j <= 100 for _, j in pairs])
    assert found == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 200))


PERFECT = {
    "number": ([0.5, 1.5, -1.0], [0.5, 1.5, -1.0]), "class": ([0, 1, 2], [0, 1, 2]),
    "classes": ([np.array([True, False, True]), np.array([False, True, False])], [np.array([.9, .1, .9]),
                                                                                  np.array([.1, .9, .1])]),
    "residues": ([np.array([0, NO_TARGET, 1]), np.array([2, 0])], [np.array([0, 2, 1]), np.array([2, 0])]),
    "numbers": ([np.array([0.5, np.nan]), np.array([1.5, -1.0])], [np.array([0.5, 9.0]), np.array([1.5, -1.0])]),
    "contacts": ([table_of_atoms(np.zeros((40, 3)))], [np.ones((40, 40))])}


@pytest.mark.parametrize("kind", LABEL_KINDS)
def test_what_is_right_everywhere_has_the_best_measures(kind):
    found = metrics.measure(space(kind, 3), *PERFECT[kind])
    assert tuple(found) == METRICS[kind]
    for name, measured in found.items():
        assert measured.value == pytest.approx(0 if name in ("mse", "mae") else 1)
        assert np.isnan([measured.low, measured.high]).all()


def test_residues_behind_a_crop_do_not_count():
    true = [np.array([0, 1, 1, 1]), np.array([1])]
    assert metrics.measure(space("residues", 2), true, [np.array([0, 0]), np.array([1])])["accuracy"].value == 2 / 3
    table, scores = table_of_atoms(np.zeros((50, 3))), np.ones((40, 40))
    assert metrics.measure(space("contacts"), [table], [scores])["long_p_at_l"].value == 1


def test_numbers_of_residues_are_judged_together_and_drawn_by_protein():
    rng = np.random.default_rng(4)
    true = [rng.normal(size=length) for length in (5, 9, 30)]
    predicted = [labels + rng.normal(size=len(labels)) for labels in true]
    true[1][3] = np.nan
    cropped = [*predicted[:2], predicted[2][:20]]
    x, y = (np.delete(np.concatenate(parts), 8) for parts in ([*true[:2], true[2][:20]], cropped))
    found = metrics.measure(space("numbers"), true, cropped, num_draws=50)
    assert found["spearman"].value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found["mse"].value == pytest.approx(np.mean((x - y) ** 2))
    means = [np.nanmean((one[:len(other)] - other) ** 2) for one, other in zip(true, cropped, strict=True)]
    assert min(means) <= found["mse"].low < found["mse"].high <= max(means)
    nothing = metrics.measure(space("numbers"), [np.full(3, np.nan)], [np.ones(3)])
    assert np.isnan([measured.value for measured in nothing.values()]).all()


@pytest.mark.parametrize("kind", ["classes", "residues"])
def test_a_protein_counts_as_often_as_it_is_drawn(kind):
    rng = np.random.default_rng(2)
    if kind == "classes":
        true, predicted = list(rng.random((30, 4)) < 0.3), list(rng.random((30, 4)))
    else:
        true, predicted = ([rng.integers(4, size=9) for _ in range(30)] for _ in range(2))
    statistic = metrics._statistic(space(kind, 4), true, predicted)
    for _ in range(5):
        drawn = rng.integers(30, size=30)
        found = metrics.measure(space(kind, 4), [true[one] for one in drawn], [predicted[one] for one in drawn])
        assert statistic(drawn) == pytest.approx({name: measured.value for name, measured in found.items()})


def test_intervals_draw_whole_proteins():
    right, wrong = np.zeros(100, dtype=int), np.ones(100, dtype=int)
    found = metrics.measure(space("residues", 2), [right, right], [right, wrong], num_draws=200)["accuracy"]
    assert (found.value, found.low, found.high) == (0.5, 0, 1)  # of residues it would be 0.43 to 0.57


def test_an_interval_of_accuracy_is_that_of_its_normal_approximation():
    rng = np.random.default_rng(0)
    true, predicted = np.zeros(2000, dtype=int), (rng.random(2000) < 0.3).astype(int)
    found = metrics.measure(space("class", 2), true, predicted, num_draws=500)["accuracy"]
    half = 1.96 * np.sqrt(found.value * (1 - found.value) / 2000)
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=half / 6)
    again = metrics.measure(space("class", 2), true, predicted, num_draws=500)["accuracy"]
    assert again == found


def test_a_spread_over_seeds_is_a_samples():
    assert metrics.spread([0.6, 0.7, 0.8]) == pytest.approx((0.7, 0.1))
    assert metrics.with_spread([0.6, 0.7, 0.8]) == "0.700 ± 0.100"
    assert metrics.with_spread([0.71]) == "0.710"


@pytest.mark.parametrize(("name", "value", "text"), [
    ("mse", 0.001719, "0.001719"), ("mae", 3.2e26, "3.2e+26"), ("spearman", 0.71249, "0.712")])
def test_errors_on_the_scale_of_labels_have_four_digits_and_the_others_three_decimals(name, value, text):
    assert metrics.with_spread([value], form=metrics.form_of(name)) == text


def test_evaluations_are_compared_by_one_metric_and_among_equals_by_the_others():
    def of(**values):
        return {name: metrics.Measured(value, np.nan, np.nan) for name, value in values.items()}

    common, rare = of(accuracy=0.9, mcc=0.0), of(accuracy=0.8, mcc=0.5)
    assert metrics.standing(common, "accuracy") > metrics.standing(rare, "accuracy")
    assert metrics.standing(common, "mcc") < metrics.standing(rare, "mcc")
    assert metrics.standing(of(accuracy=0.9, mcc=0.1), "accuracy") > metrics.standing(common, "accuracy")
    constant = of(spearman=np.nan, mse=2.0)
    assert metrics.standing(constant, "spearman") == (-np.inf, -2.0)
    assert metrics.standing(of(spearman=np.nan, mse=1.0), "spearman") > metrics.standing(constant, "spearman")
