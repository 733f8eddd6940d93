"""Short real runs of pretrain_tape.py with Muon and NorMuon agree in every layout and resume from every checkpoint."""

import pytest
import torch

from pretrain_tape import main
from tests.golden.test_layouts import LAYOUTS, MODEL, assert_close, curves, saved, train
from tests.tables import tried

# Queries, keys and values in turns of 2, 1 and 1 heads; gate and up.
GROUPED = ["--group-query-attention", "--num-query-groups", "2", "--swiglu"]
MUON, NORMUON = (["--optimizer", name, *GROUPED] for name in ("muon", "normuon"))
CASES = {
    **{f"{name}, normuon": (*LAYOUTS[name], NORMUON) for name in (
        "dp2", "dp2-optimizer", "dp2-gradients", "dp2-parameters", "dp4-parameters-within-2", "tp2", "tp2-pp2",
        "dp2-tp2", "dp2-tp2-sequence-optimizer", "pp2-uneven", "dp2-pp2-overlapped", "cp2-dp2-gradients")},
    **{f"{name}, muon": (*LAYOUTS[name], MUON) for name in ("dp2-parameters", "dp2-tp2")},
}
EACH_TIME = {"dp4-parameters-within-2, normuon", "dp2-tp2-sequence-optimizer, normuon", "dp2-tp2, muon"}


@pytest.fixture(scope="module")
def one_folder(corpus, tmp_path_factory):
    folders = {}
    for optimizer in (MUON, NORMUON):
        folders[tuple(optimizer)] = tmp_path_factory.mktemp("one")
        train(corpus, folders[tuple(optimizer)], 1, *optimizer)
    return folders


def assert_follows(ours, expected):
    """The losses to 1e-5; the norm of the gradient, which the short directions of a step move more, to 5e-5."""
    for name, curve in expected.items():
        assert_close(ours, {name: curve}, 5e-5 if name == "gradient norm" else 1e-5)


def assert_same(folder, expected_folder):
    """Weights and the optimizer's state, each tensor as a whole to 2e-4; keys' biases, which change nothing, drift."""
    for name in ("model", "optimizer"):
        ours, expected = saved(folder, name), saved(expected_folder, name)
        assert ours.keys() == expected.keys()
        for key, tensor in expected.items():
            if not key.endswith("query_key_value.bias"):
                assert (ours[key] - tensor).norm() <= 2e-4 * tensor.norm(), key


@pytest.mark.parametrize("case", tried(CASES, EACH_TIME))
def test_every_layout_follows_the_curve_of_one_rank_to_the_same_weights_and_state(corpus, tmp_path, one_folder, case):
    ranks, layout, optimizer = CASES[case]
    expected = one_folder[tuple(optimizer)]
    assert_follows(train(corpus, tmp_path, ranks, *optimizer, *layout), curves(expected))
    assert_same(tmp_path, expected)


def test_a_run_that_was_stopped_goes_on_bit_by_bit(corpus, tmp_path, one_folder):
    train(corpus, tmp_path, 1, *NORMUON, "--exit-interval", "2")
    assert train(corpus, tmp_path, 1, *NORMUON) == curves(one_folder[tuple(NORMUON)])
    for name in ("model", "optimizer"):
        ours, expected = saved(tmp_path, name), saved(one_folder[tuple(NORMUON)], name)
        assert all(torch.equal(ours[key], tensor) for key, tensor in expected.items())


def test_a_run_goes_on_in_any_layout(corpus, tmp_path, one_folder):
    expected = one_folder[tuple(NORMUON)]
    train(corpus, tmp_path, 2, *NORMUON, *LAYOUTS["dp2-parameters"][1], "--exit-interval", "1")
    train(corpus, tmp_path, 4, *NORMUON, *LAYOUTS["dp2-tp2"][1], "--exit-interval", "2")
    train(corpus, tmp_path, 1, *NORMUON, "--exit-interval", "3")
    assert_follows(train(corpus, tmp_path, 4, *NORMUON, *LAYOUTS["tp2-pp2"][1]), curves(expected))
    assert_same(tmp_path, expected)


@pytest.mark.parametrize(("before", "after"), tried([("adam", "muon"), ("muon", "normuon"), ("normuon", "adam")],
                                                    [("adam", "muon"), ("muon", "normuon")]))
def test_the_state_of_another_optimizer_is_refused_in_a_line(corpus, tmp_path, capsys, before, after):
    command = [*MODEL, "--data-path", corpus, "--save", str(tmp_path), "--load", str(tmp_path), "--train-iters", "2"]
    assert main([*command, "--exit-interval", "1", "--optimizer", before]) == 0
    capsys.readouterr()
    assert main([*command, "--optimizer", after]) == 2
    said, = capsys.readouterr().err.splitlines()
    assert f"--optimizer is {after}, but the checkpoint in {tmp_path} holds the state of {before}; give" in said
    assert main([*command, "--optimizer", after, "--no-load-optim"]) == 0


def test_the_log_says_the_learning_rate_of_each_group(corpus, tmp_path, capsys):
    train(corpus, tmp_path, 1, "--optimizer", "muon", "--head-lr", "3e-3", "--lr-warmup-fraction", "0",
          "--lr-decay-style", "constant", num_steps=1)
    assert ("learning rate: 2.000E-03 (matrix 1.000E-02, embedding 2.000E-02, head 3.000E-03, vector 5.000E-03) |"
            in capsys.readouterr().out)
