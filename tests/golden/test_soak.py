"""A short run with a fault of each kind; `python -m tests.golden.soak` has a long one with many."""

import random

from tests.golden.soak import KINDS, plan, soak


def test_a_run_that_meets_a_fault_of_each_kind_ends_as_if_it_had_not(corpus, tmp_path, python):
    chance = random.Random(5)
    faults = plan(60, chance.sample(KINDS, len(KINDS)), chance)
    soaked = soak(60, faults, corpus, tmp_path, python, chance)
    assert set(soaked.faults) == set(KINDS)
    assert len(soaked.resumed) >= 3  # after the kill, the stop and the wrong gradient
