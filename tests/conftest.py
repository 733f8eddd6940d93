"""The corpus of the short real runs, written once a session."""

import pytest
import torch

from tests.golden.training import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    torch.set_num_threads(1)  # the models are too small for more
    return write_corpus(tmp_path_factory.mktemp("corpus"))
