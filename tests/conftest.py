"""The corpus of the short real runs, written once a session, a Python for commands, and models of transformers.

What takes seconds to import is imported where it is asked for: many tests do without.
"""

import signal

import pytest

# A shell has what it starts in the background ignore Ctrl-C, which tests send to programs of theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    import torch

    from tests.golden.training import write_corpus

    torch.set_num_threads(1)  # the models are too small for more
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def python(tmp_path_factory):
    """The path of one that has loaded torch already."""
    from tests.warm_python import warm_python

    folder = tmp_path_factory.mktemp("python")
    with warm_python(folder):
        yield str(folder / "python")


@pytest.fixture(scope="session")
def their_models():
    """One of transformers of each kind."""
    from tests.transformers_models import KINDS, made

    return {kind: made(kind) for kind in KINDS}


@pytest.fixture(scope="session")
def their_folders(their_models, tmp_path_factory):
    """What it saved of each kind."""
    root = tmp_path_factory.mktemp("saved")
    for kind, model in their_models.items():
        model.save_pretrained(root / kind)
    return root
