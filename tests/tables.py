"""Marks most cases of a long table of parameters `table`, so that an ordinary run of the tests skips them.

An ordinary run tries a few cases of each table; `bash tests/run.sh -m table` tries the others.
"""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def tried(cases: Iterable[Any], each_time: Collection[Any]) -> list[Any]:
    """The parameters for pytest.mark.parametrize: `cases`, with all but `each_time` marked `table`.

    A case that is a tuple gives several arguments.
    """
    return [case if case in each_time else
            pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.table) for case in cases]
