"""Batch sizes, their ramp-up, and the number of steps of a run."""

import pytest

from megatron.config import TrainingConfig
from megatron.errors import ConfigError
from megatron.train.state import BatchSizes


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


@pytest.mark.parametrize("total", [1, 7, 8, 50, 61, 100, 101])
def test_a_run_in_samples_takes_as_many_steps_as_fit(total):
    grown = sizes(global_batch_size=8, rampup_batch_size=(2, 2, 60), train_samples=total)
    steps = consumed = 0
    while consumed + grown.at(consumed) <= total:
        consumed += grown.at(consumed)
        steps += 1
    assert grown.num_iterations() == steps


def test_a_run_in_iterations_takes_these():
    assert sizes(train_iters=12).num_iterations() == 12
