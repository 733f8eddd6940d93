"""The average of the weights: what it includes, and that it can replace the weights and give them back."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron.checkpoint.contents import Checkpoint, stored
from megatron.checkpoint.convert.formats import FORMATS
from megatron.errors import CheckpointError
from megatron.optim.average import WeightAverage
from tests.unit.test_weight_decay import parameters
from tools import convert_checkpoint

CPU = torch.device("cpu")


def after_steps(taken, decay):
    """The average after steps of which some are not taken, and the weights after each."""
    named = parameters()
    average, weights = WeightAverage(named, decay, CPU), []
    weights.append(named["dense.weight"].detach().double().numpy().copy())
    for is_taken in taken:
        if is_taken:
            for parameter in named.values():
                parameter.data.add_(torch.randn_like(parameter))
        average.update(torch.tensor(is_taken))
        weights.append(named["dense.weight"].detach().double().numpy().copy())
    return named, average, weights


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9999])
def test_it_is_that_of_the_steps_that_were_taken(decay):
    taken = [True, True, False, True, False, True, True]
    _, average, (expected, *weights) = after_steps(taken, decay)
    number = 0
    for is_taken, weight in zip(taken, weights, strict=True):
        if is_taken:
            number += 1
            kept = min(decay, (1 + number) / (10 + number))
            expected = kept * expected + (1 - kept) * weight
    np.testing.assert_allclose(average.tensors["dense.weight"].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert average.num_steps == 5


def test_a_step_that_was_not_taken_changes_no_bit_of_it():
    _, average, _ = after_steps([True, True], 0.9)
    _, after, _ = after_steps([True, True, False, False], 0.9)
    assert all(torch.equal(tensor, after.tensors[name]) for name, tensor in average.tensors.items())


def test_in_the_weights_place_it_is_the_average_and_after_it_both_are_as_they_were():
    named, average, _ = after_steps([True] * 3, 0.9)
    own, mean = ({name: tensor.detach().clone() for name, tensor in tensors.items()}
                 for tensors in (named, average.tensors))
    places = {name: parameter.data_ptr() for name, parameter in named.items()}
    with pytest.raises(KeyboardInterrupt), average.in_place():
        assert all(torch.equal(named[name], tensor) for name, tensor in mean.items())
        raise KeyboardInterrupt
    assert all(torch.equal(named[name], tensor) for name, tensor in own.items())
    assert all(torch.equal(average.tensors[name], tensor) for name, tensor in mean.items())
    assert places == {name: parameter.data_ptr() for name, parameter in named.items()}


def test_it_goes_on_as_if_it_had_not_stopped():
    named, average, _ = after_steps([True] * 3, 0.9)
    again = WeightAverage(named, 0.9, CPU)
    for name, tensor in again.tensors.items():
        tensor.copy_(average.tensors[name])
    again.go_on(average.num_steps)
    for one in (average, again):
        one.update(torch.tensor(True))
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in average.tensors.items())


def test_of_frozen_parameters_it_keeps_nothing():
    named = parameters()
    named["dense.weight"].requires_grad_(False)
    assert list(WeightAverage(named, 0.9, CPU).tensors) == ["dense.bias"]


@pytest.fixture
def checkpoint(tmp_path):
    """Of two weights, one of which was frozen."""
    model = {"a.weight": stored(torch.zeros(2, 3)), "b.weight": stored(torch.ones(2))}
    state = {"config": {"ema": 0.9, "num_attention_heads": 1},
             "progress": {"iteration": 5, "consumed_samples": 10}, "ema_steps": 5}
    return Checkpoint(tmp_path, 5, model, {"exp_avg/a.weight": stored(torch.ones(2, 3))}, state,
                      {"a.weight": stored(torch.full((2, 3), 0.5))})


@pytest.mark.parametrize("form", ["sharded", "whole"])
def test_our_formats_hold_it_and_the_conversion_writes_it_as_weights(checkpoint, form, tmp_path, monkeypatch, capsys):
    FORMATS[form].write(checkpoint, tmp_path / "run")
    found = FORMATS[form].read(tmp_path / "run")
    assert {name: tensor.read().tolist() for name, tensor in found.average.items()} == {"a.weight": [[0.5] * 3] * 2}
    for flags, mean in (([], 0.0), (["--load-ema"], 0.5)):
        target = tmp_path / f"to{mean}"
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, [
            "--load-dir", tmp_path / "run", "--save-dir", target, "--to", "whole", *flags])])
        assert convert_checkpoint.main() == 0
        after = FORMATS["whole"].read(target)
        assert after.model["a.weight"].read().mean() == mean and after.model["b.weight"].read().mean() == 1
        assert (after.average is None) == (after.optimizer is None) == bool(flags)
    assert "with the optimizer's state and the average of the weights" in capsys.readouterr().out


def test_where_there_is_none_it_cannot_stand_for_the_weights(checkpoint):
    with pytest.raises(CheckpointError, match="holds no average of the weights, .*; leave --load-ema out"):
        replace(checkpoint, average=None).averaged()
