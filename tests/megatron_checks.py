"""Comparisons of checkpoints with the hand-made ones of tests/megatron_files.py."""

import pytest
import torch

from tests.megatron_files import KINDS, STEP


def check_values(checkpoint, values):
    """Asserts that our checkpoint holds `values` (from megatron_files.wholes) bit for bit, moments included."""
    parameters = [name for name in values if "/" not in name]
    assert set(checkpoint.model) == set(parameters)
    for name in parameters:
        assert torch.equal(checkpoint.model[name].read(), values[name]), name
    if checkpoint.optimizer is not None:
        assert set(checkpoint.optimizer) == {f"{kind}/{name}" for kind in (*KINDS, "step") for name in parameters}
        for key, tensor in checkpoint.optimizer.items():
            expected = torch.tensor(float(STEP)) if key.startswith("step/") else values[key]
            assert torch.equal(tensor.read(), expected), key


def same_but_random_states(written, made):
    """Asserts that the trees of two files are equal.

    Not compared are random states, and arguments in `written` that `made` lacks.
    """
    assert list(written) == list(made)
    for key, value in made.items():
        if key == "args":
            ours, theirs = vars(written[key]), vars(value)
            assert {name: ours[name] for name in theirs} == theirs
        elif "rng" not in key:
            _check_same(written[key], value, key)


def _check_same(ours, theirs, where):
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype, where
        assert torch.equal(ours, theirs), where
    elif isinstance(theirs, dict):
        assert set(ours) == set(theirs), where
        assert [key for key in ours if isinstance(ours[key], torch.Tensor)] == [
            key for key in theirs if isinstance(theirs[key], torch.Tensor)], where
        for key, value in theirs.items():
            _check_same(ours[key], value, f"{where}/{key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            _check_same(*pair, f"{where}/{number}")
    else:
        assert ours == pytest.approx(theirs), where
