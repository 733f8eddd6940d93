"""Fixtures and settings of the tests on a GPU."""

import os

import pytest
import torch

# cuBLAS reads it at its first product, which is another test's than those of --deterministic-mode.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    """Graphs compiled before count towards torch's limit of graphs of one function."""
    torch._dynamo.reset()
