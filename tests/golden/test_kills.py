"""Runs that save every few steps survive kill -9 at random moments.

`python -m tests.golden.kills` does the same 200 times.
"""

import random

import pytest

from tests.golden.kills import KILLS_A_RUN, WAYS, endure
from tests.tables import tried


@pytest.mark.parametrize("name", tried(WAYS, ["2 ranks, async"]))
def test_a_run_that_is_killed_at_any_moment_goes_on_and_ends_as_if_it_had_not_been(name, corpus, tmp_path):
    resumed = endure(name, KILLS_A_RUN, corpus, tmp_path, random.Random(name))
    assert len(resumed) > 1
