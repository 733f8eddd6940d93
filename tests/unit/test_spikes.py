"""Which steps count as spikes, against the definition in the standard library.

Also: which rows are then left out, and which proteins these hold.
"""

import errno
import json
import math
import random
import statistics

import numpy as np
import pytest
import torch

from megatron.config import Config, DataConfig, GuardsConfig
from megatron.data.batches.order import merged, sample_at
from megatron.data.corpus.vocab import Vocab
from megatron.data.rows.dataset import build_datasets
from megatron.data.rows.members import members_of
from megatron.errors import ConfigError
from megatron.parallel.mesh import Axis
from megatron.train.guards.faults import Faults
from megatron.train.state import TrainState
from megatron.train.step.spikes import HISTORY, LEAST, SpikeJudge
from tests.indexed_files import write_indexed

CPU = torch.device("cpu")


def judge(may_overflow=False, threshold=10.0):
    return SpikeJudge(GuardsConfig(spike_threshold=threshold), CPU, may_overflow)


def is_normal(one, loss, norm):
    return bool(one.is_normal(torch.tensor(loss), torch.tensor(norm)))


def judge_of(loss, number):
    """A judge that was shown this loss so many times."""
    one = judge()
    assert all(is_normal(one, loss, 1.0) for _ in range(number))
    return one


def steps(number, seed=0):
    draw = random.Random(seed)
    return [(draw.gauss(2.7, 0.05), draw.gauss(0.6, 0.1)) for _ in range(number)]


def test_what_is_far_is_so_by_the_definition():
    one, kept = judge(threshold=3.0), []
    for loss, norm in [(loss + 0.3 * (number % 37 == 0), norm) for number, (loss, norm) in enumerate(steps(400))]:
        limits = [math.inf, math.inf]
        if len(kept) >= LEAST:
            for which in (0, 1):
                values = [step[which] for step in kept[-HISTORY:]]
                # The lower of two middle values, as torch has it.
                middle = statistics.median_low(values)
                deviation = 1.4826 * statistics.median_low([abs(value - middle) for value in values])
                limits[which] = middle + 3 * max(deviation, 0.005 * middle)
        expected = loss <= limits[0] and norm <= limits[1]
        assert is_normal(one, loss, norm) == expected
        kept += [(loss, norm)] * expected
    assert len(kept) < 400


def test_before_there_are_steps_to_compare_with_only_what_is_not_finite_is_wrong():
    one = judge()
    assert is_normal(one, 3.0, 1.0)
    assert is_normal(one, 300.0, 100.0)
    assert not is_normal(one, math.nan, 1.0)
    assert not is_normal(one, 3.0, math.inf)


def test_a_falling_loss_and_a_step_without_targets_are_normal():
    one = judge()
    assert all(is_normal(one, 3 * 0.97**number, 1.0) for number in range(200))
    assert is_normal(one, 0.0, 0.0)
    assert is_normal(one, 3 * 0.97**200, 1.0)


def test_a_step_without_targets_is_not_compared_with():
    assert judge_of(0.0, LEAST).state()["num_steps"] == 0


def test_the_first_step_with_enough_others_behind_it_is_judged():
    assert is_normal(judge_of(2.0, LEAST - 1), 20.0, 1.0)
    assert not is_normal(judge_of(2.0, LEAST), 20.0, 1.0)


def test_where_losses_hardly_differ_a_small_rise_is_no_spike():
    assert is_normal(judge_of(2.0, LEAST), 2.05, 1.0)


def test_in_fp16_a_gradient_may_overflow_and_a_loss_may_not():
    one = judge(may_overflow=True)
    assert is_normal(one, 3.0, math.inf)
    assert not is_normal(one, math.nan, 1.0)


def test_a_judge_that_goes_on_from_a_checkpoint_judges_alike():
    one, other = judge(threshold=2.0), judge(threshold=2.0)
    for step in steps(150):
        is_normal(one, *step)
    other.load_state(json.loads(json.dumps(one.state())))
    answers = [(is_normal(one, *step), is_normal(other, *step)) for step in steps(150, seed=1)]
    assert {left == right for left, right in answers} == {True}
    assert {left for left, _ in answers} == {True, False}


def test_what_is_left_out_is_jumped_over():
    windows = merged([(8, 9), (3, 5), (4, 6), (9, 11)])
    assert windows == ((3, 6), (8, 11))
    assert [sample_at(position, windows) for position in range(8)] == [0, 1, 2, 6, 7, 11, 12, 13]


def test_a_window_counts_once_and_none_may_lie_behind():
    state = TrainState(5, 10, left_out=((4, 8),))
    state.leave_out([(4, 8), (20, 24)])
    assert state.left_out == ((4, 8), (20, 24))
    with pytest.raises(ConfigError, match="has come to sample 14 already; give 14-16"):
        state.leave_out([(12, 16)])
    state.leave_out([(14, 16)])
    assert state.left_out == ((4, 8), (14, 16), (20, 24))


def test_a_fault_of_the_rows_comes_with_them_and_one_of_a_device_once():
    faults = Faults(Config(guards=GuardsConfig(inject_fault=("nan@2", "flip@4"))), Axis())
    factors = [faults.factor(step, 4 * step) for step in (1, 2, 3, 4, 2, 3, 4)]
    assert [math.isnan(factor) for factor in factors] == [False, True, False, True, True, False, False]
    assert not math.isnan(faults.factor(2, 12)) and math.isnan(faults.factor(9, 8))


def meets_full_disk(faults, iteration):
    try:
        faults.meet_disk(iteration)
    except OSError as error:
        assert error.errno == errno.ENOSPC
        return True
    return False


def test_a_full_disk_meets_one_save_at_or_behind_its_step_and_none_of_a_run_that_goes_on_behind_it():
    config = Config(guards=GuardsConfig(inject_fault=("full-disk@5", "full-disk@6")))
    for first_step, expected in ((1, [False, True, True, False]), (6, [False, True, False, False]), (7, [False] * 4)):
        faults = Faults(config, Axis())
        faults.factor(first_step, 0)
        assert [meets_full_disk(faults, iteration) for iteration in (4, 8, 12, 16)] == expected


def test_the_proteins_of_rows_are_told_by_corpus_number_and_name(tmp_path):
    for name, letter in (("a", 6), ("b", 7)):
        write_indexed(tmp_path / name, (np.full(5 + number, letter, np.uint16) for number in range(20)))
    (tmp_path / "b.names").write_text("".join(f"protein {number}\n" for number in range(20)))
    paths = ("1", str(tmp_path / "a"), "1", str(tmp_path / "b"))
    data = DataConfig(data_path=paths, split="10,5,5", seq_length=64)
    train = build_datasets(data, Vocab.from_file(), seed=1).train
    members = members_of(train, range(12))
    assert {member.sample for member in members} == set(range(12))
    for member in members:
        assert member.num_residues == 5 + member.document
        assert member.name == (f"protein {member.document}" if member.prefix.endswith("b") else "")
    for sample in range(12):
        lengths = [member.num_residues + 1 for member in members if member.sample == sample]
        assert lengths == train[sample].lengths.tolist()
