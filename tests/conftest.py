"""The corpus of the short real runs, written once a session."""

import pytest
import torch

from tests.golden.training import write_corpus
from tests.transformers_models import KINDS, made


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    torch.set_num_threads(1)  # the models are too small for more
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def their_models():
    """One of transformers of each kind."""
    return {kind: made(kind) for kind in KINDS}


@pytest.fixture(scope="session")
def their_folders(their_models, tmp_path_factory):
    """What it saved of each kind."""
    root = tmp_path_factory.mktemp("saved")
    for kind, model in their_models.items():
        model.save_pretrained(root / kind)
    return root
