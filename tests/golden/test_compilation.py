"""Blocks that torch.compile has compiled: once, for all proteins, and with the losses of those that are not."""

import pytest
import torch
from torch._dynamo.utils import counters

from pretrain_tape import main
from tests.golden.training import TINY, losses


@pytest.fixture(scope="module")
def compiled_run(corpus, tmp_path_factory):
    """The folders of 50 steps, eager and compiled, and how many graphs were compiled."""
    folder = tmp_path_factory.mktemp("compiled")
    flags = [*TINY, "--data-path", corpus, "--train-iters", "50", "--eval-interval", "20"]
    assert main([*flags, "--save", str(folder / "eager")]) == 0
    torch._dynamo.reset()
    counters.clear()
    assert main([*flags, "--save", str(folder / "compiled"), "--compile"]) == 0
    return folder, counters["stats"]["unique_graphs"], dict(counters["graph_break"])


def test_fifty_steps_of_changing_proteins_and_their_evaluations_are_one_compilation(compiled_run):
    _, num_graphs, breaks = compiled_run
    assert num_graphs == 1  # for all blocks
    assert breaks == {}


@pytest.mark.parametrize("kind", ["train", "valid", "test"])
def test_a_compiled_run_has_the_losses_of_an_eager_one(compiled_run, kind):
    folder, *_ = compiled_run
    eager, compiled = (losses(folder / name, kind) for name in ("eager", "compiled"))
    assert eager
    assert compiled == pytest.approx(eager, rel=1e-5)
