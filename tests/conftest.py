"""Fixtures made once per session: a small corpus, a `python` that has loaded torch, and models of transformers.

Modules that take seconds to import are imported inside the fixtures, because many tests do without them.
"""

import signal

import pytest

# A shell makes its background processes ignore SIGINT, and they pass that on. Tests send it to programs they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """The path of a small preprocessed corpus, for short real runs of pretrain_tape.py."""
    import torch

    from tests.golden.training import write_corpus

    torch.set_num_threads(1)  # the models are too small for more
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def python(tmp_path_factory):
    """The path of a `python` that starts with torch already loaded."""
    from tests.warm_python import warm_python

    folder = tmp_path_factory.mktemp("python")
    with warm_python(folder):
        yield str(folder / "python")


@pytest.fixture(scope="session")
def their_models():
    """A small transformers model of each kind in `KINDS`, by kind."""
    from tests.transformers_models import KINDS, made

    return {kind: made(kind) for kind in KINDS}


@pytest.fixture(scope="session")
def their_folders(their_models, tmp_path_factory):
    """A folder that holds, for each kind, a subfolder written by transformers' save_pretrained."""
    root = tmp_path_factory.mktemp("saved")
    for kind, model in their_models.items():
        model.save_pretrained(root / kind)
    return root
