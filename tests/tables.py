"""Long tables: of each a few cases, of every kind one, are tried each time, all by `bash tests/run.sh -m table`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def tried(cases: Iterable[Any], each_time: Collection[Any]) -> list[Any]:
    """Parameters of a test: those of `each_time` as they are, the others marked as a table's; a tuple is several."""
    return [case if case in each_time else
            pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.table) for case in cases]
