"""Fixtures and settings of the tests on a GPU."""

import os

import pytest
import torch

# cuBLAS reads it at the first product of the process, which comes before the tests of --deterministic-mode.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    """Forget the graphs of earlier tests: they count towards torch's limit of compiled graphs per function."""
    torch._dynamo.reset()
