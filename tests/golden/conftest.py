"""Runs in the tests' own processes do not draw their pictures, except in tests that ask for it."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.golden.training import undrawn


@pytest.fixture(scope="module", autouse=True)
def draw() -> Iterator[Any]:
    """matplotlib's method that draws a figure to a file; another, which does not draw, stands in its place."""
    with undrawn() as drawing:
        yield drawing


@pytest.fixture
def drawn(draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the runs of a test draw their pictures."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", draw)
