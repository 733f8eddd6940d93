"""Learning rates and weight decay go on along their schedules, also in a run that is made longer."""

import pytest
import torch

from tests.golden.training import losses, weights

WSD = ["--lr-decay-style", "WSD", "--lr-wsd-decay-iters", 2, "--lr-warmup-fraction", 0, "--lr-warmup-iters", 1,
       "--save-interval", 4]


def test_a_run_is_prolonged_from_before_its_decay_to_what_a_longer_one_is(run, tmp_path):
    run(*WSD, "--train-iters", 6)
    within = run.error(*WSD, "--train-iters", 10)
    assert "iter_0000006 is inside the decay of the learning rate, which began after 8 samples and is now to begin "\
        "after 16; go on from a checkpoint before it" in within
    (run.folder / "latest_checkpointed_iteration.txt").write_text("4")
    run(*WSD, "--train-iters", 10)
    assert ("note: the learning rate schedule ends after 20 samples, before it was 12: for the 8 consumed so far the "
            "two are the same") in run.notes()
    prolonged, run.folder = run.folder, tmp_path / "long"
    run(*WSD, "--train-iters", 10)
    for kind in ("loss", "learning_rate"):
        assert losses(prolonged, name=kind) == losses(run.folder, name=kind)
    longer = weights(run.folder, 10)
    assert all(torch.equal(tensor.read(), longer[name].read()) for name, tensor in weights(prolonged, 10).items())
    assert losses(run.folder, name="learning_rate")[10] < losses(run.folder, name="learning_rate")[8] == 2e-3


def test_a_warm_up_that_grows_with_the_run_is_another_course(run):
    run(*WSD[:-6], "--train-iters", 6, "--exit-interval", 2)
    assert "(--lr-warmup-fraction 0.1 is of the decay, and so of --train-iters; --lr-warmup-iters or " in run.error(
        *WSD[:-6], "--train-iters", 10)


def test_a_run_that_is_longer_than_the_course_of_its_checkpoint_says_so(begun):
    begun("--train-iters", 12, "--use-checkpoint-lr-scheduler", "--exit-interval", 5)
    assert [note for note in begun.notes() if "decayed after 16 samples, and the run ends after 24: all between are "
            "trained at --min-lr 0.0001; --override-lr-scheduler takes the flags' schedule in its place" in note]


def test_sgd_without_momentum_keeps_nothing_and_goes_on_all_the_same(run, tmp_path):
    flags = ["--optimizer", "sgd", "--sgd-momentum", 0, "--train-iters", 8]
    run(*flags, "--exit-interval", 4)
    run(*flags)
    stopped, run.folder = run.folder, tmp_path / "unbroken"
    run(*flags)
    unbroken = weights(run.folder, 8)
    assert all(torch.equal(tensor.read(), unbroken[name].read()) for name, tensor in weights(stopped, 8).items())

COURSES = ["--weight-decay-incr-style", "cosine", "--start-weight-decay", 0, "--end-weight-decay", 9,
           "--cautious-weight-decay"]


@pytest.mark.parametrize("optimizer", ["adam", "normuon"])
def test_a_run_with_a_course_of_cautious_weight_decay_goes_on_as_if_it_had_not_stopped(run, tmp_path, optimizer):
    flags = [*COURSES, "--optimizer", optimizer, "--train-iters", 8]
    run(*flags, "--exit-interval", 4)
    run(*flags)
    assert run.notes() == []
    stopped, run.folder = run.folder, tmp_path / "unbroken"
    run(*flags)
    unbroken = weights(run.folder, 8)
    assert all(torch.equal(tensor.read(), unbroken[name].read()) for name, tensor in weights(stopped, 8).items())
    decays = losses(run.folder, name="weight_decay")
    assert decays == losses(stopped, name="weight_decay") and 0 < decays[2] < decays[8] < 9
    assert "--weight-decay-incr-style is constant, in " in run.error(
        "--optimizer", optimizer, "--train-iters", 8, "--use-checkpoint-lr-scheduler")
    assert "end weight decay of the learning-rate schedule is 8.0, in the checkpoint 9.0" in run.error(
        *flags, "--end-weight-decay", 8)
    assert ("weight decay incr samples of the learning-rate schedule is 24, in the checkpoint 16 (--weight-decay-incr-"
            "style is a schedule over the whole run, which so cannot be prolonged)") in run.error(
                *flags, "--lr-decay-iters", 8, "--train-iters", 12)
