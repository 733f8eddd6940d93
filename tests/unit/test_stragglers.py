"""Which rank is named as slow, from invented times, and what counts as waiting."""

import statistics

import pytest
import torch

from megatron.log import Log
from megatron.parallel.data.replicated import _Buckets
from megatron.parallel.mesh import Mesh
from megatron.parallel.waits import Waits
from megatron.train.guards.stragglers import LEAST_STEPS, Stragglers, slowest
from megatron.train.step.meters import RankTimes, Reading


@pytest.fixture
def stragglers(capsys):
    """Those of four ranks on four hosts, and a function that gives them a reading; it returns what is said."""
    one = Stragglers(Mesh(), Log())
    one._hosts, one._stages, one._computed_s = ("a", "b", "c", "d"), (0, 0, 0, 0), [0.0] * 4

    def read(*compute_s, num_steps=LEAST_STEPS):
        times = [RankTimes(seconds, 3.0 - seconds) for seconds in compute_s]
        reading = Reading(num_steps, num_steps, 2.5, 0.1, 1.0, 0, 10, 10, 1.0, 3.0, [], times)
        return one.look(reading), capsys.readouterr().out

    return read


@pytest.mark.parametrize(("compute_s", "stages", "expected"), [
    ([1.0, 2.0], [0, 0], (1, 2.0)),
    ([1.0, 1.0, 3.0, 2.0], [0, 0, 0, 0], (2, 3.0 / statistics.median([1.0, 1.0, 2.0]))),
    ([1.0, 5.0, 1.0, 6.0], [0, 1, 0, 1], (3, 1.2)),  # the second stage has more to do
    ([1.0, 9.0], [0, 1], None), ([1.0], [0], None)])
def test_a_rank_is_compared_with_the_others_of_its_stage(compute_s, stages, expected):
    assert slowest(compute_s, stages) == expected


def test_a_slow_rank_is_named_with_its_host_once_for_as_long_as_it_is(stragglers):
    assert stragglers(1.0, 1.0, 1.25, 1.0)[1] == ""  # the first steps tell nothing
    _, said = stragglers(1.0, 1.0, 1.25, 1.0)
    assert said.startswith(f"note: rank 2 on c is slower than the others: in the last {LEAST_STEPS} steps it computed "
                           "for 125.0 ms each, 25 % more than the median of those with the same work")
    assert stragglers(1.0, 1.0, 1.25, 1.0)[1] == ""
    assert stragglers(1.0, 1.0, 1.19, 1.0)[1] == ""
    assert stragglers(1.0, 1.0, 1.25, 1.0)[1].startswith("note: rank 2 on c")
    assert stragglers(1.0, 1.5, 1.25, 1.0)[1].startswith("note: rank 1 on b")


def test_short_readings_are_judged_together(stragglers):
    assert all(stragglers(0.1, 0.1, 0.4, 0.1, num_steps=1)[1] == "" for _ in range(2 * LEAST_STEPS - 1))
    assert stragglers(0.1, 0.1, 0.4, 0.1, num_steps=1)[1].startswith("note: rank 2 on c")


def test_the_metrics_have_each_ranks_times_a_step(stragglers):
    found, _ = stragglers(1.0, 1.0, 2.0, 1.0)
    assert found == {"compute_ms": [100.0, 100.0, 200.0, 100.0],
                     "exposed_communication_ms": [200.0, 200.0, 100.0, 200.0],
                     "exposed_communication": pytest.approx(7 / 12), "slowest_rank": 2, "slowest_rank_factor": 2.0}


def test_of_waits_within_one_another_the_outer_is_counted_and_none_while_nothing_counts(monkeypatch):
    now_s = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now_s[0])
    waits = Waits(torch.device("cpu"))

    def wait(seconds, then=lambda: None):
        now_s[0] += seconds
        then()
        return seconds

    assert waits.during(wait, 5.0) == 5.0
    assert waits.take_s() == 0.0
    waits.is_counting = True
    assert waits.during(wait, 2.0, then=lambda: waits.during(wait, 1.0)) == 2.0
    now_s[0] += 7.0
    waits.during(wait, 0.5)
    assert waits.take_s() == 3.5
    assert waits.take_s() == 0.0


def test_of_sums_beside_several_stages_backward_passes_what_comes_behind_the_last_stage_is_waited_for(monkeypatch):
    now_s = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now_s[0])
    waits = Waits(torch.device("cpu"))
    waits.is_counting, buckets = True, _Buckets(None, waits, num_stages=2)
    for _ in range(3):  # steps
        for _ in range(2):  # stages
            now_s[0] += 10.0
            buckets.is_last_of_stage()
        now_s[0] += 0.5
        buckets.arrived()
    assert waits.take_s() == 1.5


class Event:
    """An event of a stream that is behind the host by two units of its clock; nobody can wait for it."""

    host, num_made = 0.0, 0

    def __init__(self, device, enable_timing):
        assert (device, enable_timing) == ("cuda", True)
        Event.num_made += 1

    def record(self):
        self.at = Event.host

    def query(self):
        return Event.host >= self.at + 2

    def elapsed_time(self, end):
        assert end.query()
        return 1000.0 * (end.at - self.at)


def test_on_a_gpu_waits_are_read_from_events_that_have_passed_and_are_used_again(monkeypatch):
    monkeypatch.setattr("torch.Event", Event)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    waits = Waits(torch.device("cuda"))
    waits.is_counting = True
    for _ in range(100):
        begin = waits.begin()
        Event.host += 0.5
        waits.end(begin)
        Event.host += 0.5
    Event.host += 2
    assert waits.take_s() == 50.0
    assert Event.num_made < 10
