"""A short run with a fault of each kind except a frozen rank, which test_failures.py covers.

`python -m tests.golden.soak` makes a long run with many faults.
"""

import random

import pytest

from tests.golden.soak import KINDS, plan, soak


@pytest.mark.table
def test_a_run_that_meets_faults_ends_as_if_it_had_not(corpus, tmp_path, python):
    chance = random.Random(5)
    kinds = {*KINDS} - {"freeze"}
    faults = plan(60, chance.sample(sorted(kinds), len(kinds)), chance)
    soaked = soak(60, faults, corpus, tmp_path, python, chance)
    assert {kind for kind, number in soaked.faults.items() if number} == kinds
    assert len(soaked.resumed) >= 3  # after the kill, the stop and the wrong gradient
