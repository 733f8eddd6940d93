"""Fixtures of the golden tests: runs in the tests' own processes, which do not draw pictures unless a test asks."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.golden.training import Runs, undrawn


@pytest.fixture(scope="module", autouse=True)
def draw() -> Iterator[Any]:
    """matplotlib's method that draws a figure to a file; another, which does not draw, stands in its place."""
    with undrawn() as drawing:
        yield drawing


@pytest.fixture
def drawn(draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the runs of a test draw their pictures."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", draw)


@pytest.fixture
def run(corpus, tmp_path, capsys):
    return Runs(corpus, tmp_path / "run", capsys)


@pytest.fixture
def begun(run):
    """A run that stands at iteration 4 of 8."""
    return run("--train-iters", 8, "--exit-interval", 4)
