"""Contacts from the attention maps of a model without a contact head: features, the regression on them, and precision.

scikit-learn's liblinear, with which ESM was fitted, is the oracle where it is installed.
"""

from importlib.metadata import version

import numpy as np
import pytest
import torch

from megatron import load_pretrained
from megatron.data.corpus.vocab import AMINO_ACIDS
from megatron.errors import DataError
from megatron.infer.contacts import l1_logistic
from megatron.infer.contacts.chains import Chain, Pairs
from megatron.infer.contacts.precision import RANGES, mean_and_interval, precisions
from megatron.infer.contacts.regression import corrected, drawn, fitted, pair_features
from tests.unit.test_pretrained import saved


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return load_pretrained(str(saved(tmp_path_factory.mktemp("run"))))


def test_corrected_maps_are_those_of_the_definition():
    maps = torch.rand(3, 7, 7)
    for mine, exact in zip(corrected(maps).double(), maps.double().numpy(), strict=True):
        total = exact + exact.T
        exact = [[total[i, j] - total[i].sum() * total[:, j].sum() / total.sum() for j in range(7)] for i in range(7)]
        np.testing.assert_allclose(mine, exact, atol=1e-6)


def test_features_that_are_weighed_are_the_logits_of_a_model_with_a_contact_head(their_folders):
    pretrained = load_pretrained(str(their_folders / "esm2"))
    chain = Chain("1abc_A", "MKTAYIAKQRQISFVKSHFSRQ", torch.zeros(22, 3))
    pairs, head = chain.pairs(), pretrained.model.contact_head
    features = pair_features(pretrained, chain, pairs)
    chances = torch.from_numpy(pretrained.contacts([chain.sequence])[0][pairs.first_p, pairs.second_p])
    torch.testing.assert_close((features @ head.weight[0] + head.bias).sigmoid(), chances, atol=1e-5, rtol=0)


def test_pairs_are_of_resolved_residues_that_are_far_apart_in_the_sequence_and_close_in_space():
    atoms = [[0, 0, 0], *[[20, 0, 9 * place] for place in range(5)], [0, 0, 7.9], [torch.nan] * 3, [0, 0, 8.1]]
    pairs = Chain("x", "A" * 9, torch.tensor(atoms)).pairs()
    found = list(zip(pairs.first_p.tolist(), pairs.second_p.tolist(), pairs.touches_p.tolist(), strict=True))
    assert found == [(0, 6, True), (0, 8, False), (1, 8, False), (2, 8, False)]


def test_precision_is_the_share_of_contacts_among_the_highest_scores():
    first, second = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0]), torch.tensor([6, 24, 25, 11, 26, 8, 12, 23])
    touches = torch.tensor([True, False, True, True, False, False, False, True])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    found = dict(zip(RANGES, precisions(scores, Pairs(first, second, touches), length=5).tolist(), strict=True))
    assert found["all"] == pytest.approx([3 / 5, 1 / 2, 1])  # L / 2 is 2
    assert found["long"] == pytest.approx([1 / 3, 1 / 2, 0])  # of three pairs
    assert found["short"] == pytest.approx([2 / 3, 1, 1])  # 6, 11 and 8 apart
    assert found["medium"] == pytest.approx([1 / 2, 1 / 2, 0])  # 12 and 23


def test_a_chain_without_pairs_has_no_precision(pretrained):
    chain = Chain("x", "MKTAY", torch.zeros(5, 3))
    pairs = chain.pairs()
    features = pair_features(pretrained, chain, pairs)
    assert features.shape == (0, 4)
    assert np.isnan(precisions(features[:, 0], pairs, 5)).all()


def test_scores_that_are_all_the_same_tell_as_much_as_chance():
    first, second = torch.triu_indices(300, 300, 6)
    touches = first < 30  # as if sequence order were a hint
    found = precisions(torch.zeros(len(first)), Pairs(first, second, touches), 300)
    expected = touches.float().mean()
    assert found[list(RANGES).index("all"), 0] == pytest.approx(float(expected), abs=0.1)


def told(weights, num_pairs=4000, seed=0):
    """Features with correlations and scales of their own, and labels drawn by a logistic model."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_pairs, len(weights))) @ (np.eye(len(weights)) + 0.3) * 10.0 ** -np.arange(len(weights))
    y = rng.random(num_pairs) < 1 / (1 + np.exp(2 - x @ weights))
    return x, y


def test_the_regression_is_where_0_is_a_subgradient_and_leaves_useless_features_out():
    x, y = told(np.array([1.0, 0.0, -200.0, 0.0]))
    pieces = np.array_split(np.arange(len(x)), 3)
    theta = l1_logistic.fit([torch.from_numpy(x[piece]) for piece in pieces],
                            [torch.from_numpy(y[piece]) for piece in pieces], c=0.15, tolerance=1e-6).numpy()
    error = 1 / (1 + np.exp(-(x @ theta[:-1] + theta[-1]))) - y
    gradient = 0.15 * np.array([*(x.T @ error), error.sum()])
    for weight, slope in zip(theta[:-1], gradient[:-1], strict=True):
        if weight:
            assert slope == pytest.approx(-np.sign(weight), abs=1e-5)
        else:
            assert abs(slope) <= 1
    assert gradient[-1] == pytest.approx(0, abs=1e-5)
    assert theta[0] > 0 > theta[2] and theta[3] == 0


def test_no_step_from_the_fitted_weights_lowers_the_objective():
    x, y = told(np.array([1.0, -10.0, 0.0]))

    def objective(theta):
        logits = x @ theta[:-1] + theta[-1]
        return np.abs(theta[:-1]).sum() + 0.15 * (np.logaddexp(0, logits) - y * logits).sum()

    theta = l1_logistic.fit([torch.from_numpy(x)], [torch.from_numpy(y)], c=0.15).numpy()
    rng = np.random.default_rng(1)
    steps = rng.normal(size=(500, 4)) * 10.0 ** rng.integers(-4, 1, (500, 1))
    assert min(objective(theta + step) for step in steps) >= objective(theta) - 1e-6


def test_a_penalty_that_no_feature_is_worth_leaves_the_log_odds():
    x, y = told(np.array([1.0, 0.0]))
    theta = l1_logistic.fit([torch.from_numpy(x).float()], [torch.from_numpy(y)], c=1e-6)
    assert theta.tolist() == pytest.approx([0, 0, np.log(y.mean() / (1 - y.mean()))])


def random_chains(number, length=40):
    """Residues, and atoms that fold back on themselves, one in ten unresolved."""
    rng = np.random.default_rng(0)
    for name in range(number):
        steps = rng.normal(size=(length, 3))
        atoms = (3.8 * steps / np.linalg.norm(steps, axis=1, keepdims=True)).cumsum(0)
        atoms[rng.random(length) < 0.1] = np.nan
        yield Chain(str(name), "".join(rng.choice(list(AMINO_ACIDS), length)), torch.from_numpy(atoms).float())


def test_the_weights_are_those_of_scikit_learns_liblinear_on_the_same_features(pretrained):
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    chains = list(random_chains(6))
    ours = fitted(pretrained, chains, c=100.0).numpy()  # maps of random weights are all but flat
    features = torch.cat([pair_features(pretrained, chain, chain.pairs()) for chain in chains]).numpy()
    touches = torch.cat([chain.pairs().touches_p for chain in chains]).numpy()
    # liblinear penalises the bias as well, the less the greater its column of features
    lasso = {"l1_ratio": 1} if int(version("scikit-learn").split(".")[1]) >= 8 else {"penalty": "l1"}
    theirs = linear_model.LogisticRegression(solver="liblinear", C=100.0, intercept_scaling=30, tol=1e-6, **lasso
                                             ).fit(features, touches)
    assert 0 < np.count_nonzero(ours[:-1]) < len(ours) - 1
    np.testing.assert_allclose(ours[:-1], theirs.coef_[0], rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(ours[-1], theirs.intercept_[0], rtol=2e-3)


def test_chains_are_drawn_alike_for_every_model_and_each_once():
    chains = list(random_chains(9))
    assert [chain.name for chain in drawn(chains, 4, 1)] == [chain.name for chain in drawn(chains, 4, 1)]
    assert len({chain.name for chain in drawn(chains, 20, 0)}) == 9
    assert [chain.name for chain in drawn(chains, 4, 1)] != [chain.name for chain in drawn(chains, 4, 2)]


def test_structures_without_a_contact_are_no_example(pretrained):
    far = Chain("far", "A" * 20, torch.arange(60).view(20, 3) * 100.0)
    with pytest.raises(DataError, match="far: of the pairs of resolved residues none, or each, is a contact"):
        fitted(pretrained, [far])


def test_chains_longer_than_the_models_positions_are_cropped_to_be_fitted_on(pretrained):
    (long,) = random_chains(1, length=80)
    assert torch.equal(fitted(pretrained, [long]), fitted(pretrained, [long.cropped(pretrained.max_residues)]))


def test_a_mean_has_the_interval_of_a_normal_one_and_leaves_what_is_no_number_out():
    values = np.random.default_rng(1).normal(0.5, 0.1, 400)
    mean, low, high = mean_and_interval([*values, np.nan])
    half = 1.96 * values.std() / 400**0.5
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=half / 10)
    assert np.isnan(mean_and_interval([np.nan])).all()
