"""Batch sizes, their ramp-up, and the number of steps of a run."""

import pytest

from megatron.config import TrainingConfig
from megatron.errors import ConfigError
from megatron.train.state import BatchSizes, TrainState


def sizes(data_size=1, **flags):
    return BatchSizes(TrainingConfig(micro_batch_size=2, **flags), data_size)


def test_the_global_batch_defaults_to_one_micro_batch_a_rank():
    assert sizes(data_size=3, train_iters=1).final == 6


def test_a_global_batch_that_ranks_and_micro_batch_do_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"--global-batch-size 8 is not divisible by --micro-batch-size 2 x 3"):
        sizes(data_size=3, global_batch_size=8, train_iters=1)
    with pytest.raises(ConfigError, match="INCREMENT 3"):
        sizes(global_batch_size=8, rampup_batch_size=(2, 3, 100), train_samples=9)
    with pytest.raises(ConfigError, match="does not reach"):
        sizes(global_batch_size=8, rampup_batch_size=(2, 4, 100), train_samples=9)


def test_the_batch_grows_in_equal_shares_of_the_samples():
    grown = sizes(global_batch_size=8, rampup_batch_size=(2, 2, 60), train_samples=1000)
    assert [grown.at(samples) for samples in (0, 19, 20, 39, 40, 59, 60, 999)] == [2, 2, 4, 4, 6, 6, 8, 8]


@pytest.mark.parametrize("total", [2, 7, 8, 50, 61, 100, 101])
@pytest.mark.parametrize("begun", [(0, 0), (3, 6), (9, 54), (4, 64), (70, 100), (70, 140)])
def test_a_run_in_samples_takes_as_many_steps_as_fit_from_wherever_it_stands(total, begun):
    grown = sizes(global_batch_size=8, rampup_batch_size=(2, 2, 60), train_samples=total)
    iteration, consumed = begun
    while consumed + grown.at(consumed) <= total:
        consumed += grown.at(consumed)
        iteration += 1
    assert grown.last_iteration(TrainState(*begun)) == iteration


@pytest.mark.parametrize("batch", [2, 4, 8, 32])
def test_a_run_in_samples_ends_within_a_step_of_them_after_another_batch_size(batch):
    changed, begun = sizes(global_batch_size=batch, train_samples=400), TrainState(40, 160)
    end = begun.consumed_samples + batch * (changed.last_iteration(begun) - begun.iteration)
    assert 400 - batch < end <= 400


def test_a_run_in_iterations_takes_these():
    assert sizes(train_iters=12).last_iteration(TrainState()) == 12
    assert sizes(train_iters=12).last_iteration(TrainState(5, 999)) == 12


def test_a_run_that_ends_before_its_first_step_is_refused():
    with pytest.raises(ConfigError, match="--train-samples 3 is less than the 4 rows of the first step"):
        sizes(global_batch_size=4, train_samples=3)
    with pytest.raises(ConfigError, match="give at least 2"):
        sizes(global_batch_size=4, rampup_batch_size=(2, 2, 10), train_samples=1)
