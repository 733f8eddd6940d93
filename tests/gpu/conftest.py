"""What the tests on a GPU share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    """Graphs compiled before count towards torch's limit of graphs of one function."""
    torch._dynamo.reset()
