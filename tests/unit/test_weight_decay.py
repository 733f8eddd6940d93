"""Scheduled and cautious weight decay agree with plain loops."""

import math
import sys
import types

import numpy as np
import pytest
import torch

from megatron.config import OptimizerConfig, PrecisionConfig
from megatron.errors import ConfigError
from megatron.optim.optimizer import Optimizer
from megatron.optim.scaling import LossScale
from megatron.parallel.parameters import BIAS, Normal, matrix, whole_parameter

SCALE = LossScale(PrecisionConfig(), torch.device("cpu"))
RATE, DECAY = 0.1, 0.5


def parameters():
    torch.manual_seed(0)
    named = {"dense.weight": whole_parameter((5, 3), matrix(Normal(0.02))), "dense.bias": whole_parameter((4,), BIAS)}
    for parameter in named.values():
        parameter.data.normal_()
    return named


def stepped(named, optimizer, factors=(1.0, -2.0, 0.5), scale=SCALE, decays=()):
    """The weights of the matrix after each step along gradients that turn about."""
    torch.manual_seed(1)
    weights = []
    for number, factor in enumerate(factors):
        for parameter in named.values():
            parameter.grad = torch.randn_like(parameter) * factor
        if decays:
            optimizer.set_weight_decay(decays[number])
        optimizer.step(RATE, scale)
        weights.append(named["dense.weight"].detach().clone())
    return weights


def test_adamws_cautious_decay_follows_its_definition_a_coordinate_at_a_time():
    named = parameters()
    x = named["dense.weight"].detach().double().numpy().copy()
    scale = LossScale(PrecisionConfig(fp16=True, loss_scale=64.0), torch.device("cpu"))
    config = OptimizerConfig(weight_decay=DECAY, cautious_weight_decay=True, clip_grad=0.0)
    ours = stepped(named, Optimizer(named, config), scale=scale)
    torch.manual_seed(1)
    first, second, num_spared = np.zeros_like(x), np.zeros_like(x), 0
    for number, (factor, weight) in enumerate(zip((1.0, -2.0, 0.5), ours, strict=True), 1):
        g = (torch.randn(5, 3) * factor).double().numpy() / 64
        torch.randn(4)
        for place in np.ndindex(x.shape):
            first[place] = 0.9 * first[place] + 0.1 * g[place]
            second[place] = 0.999 * second[place] + 0.001 * g[place]**2
            update = first[place] / (1 - 0.9**number) / (math.sqrt(second[place] / (1 - 0.999**number)) + 1e-8)
            agrees = update * x[place] >= 0
            num_spared += not agrees
            x[place] -= RATE * (update + (DECAY * x[place] if agrees else 0.0))
        np.testing.assert_allclose(weight.numpy(), x, rtol=1e-5, atol=1e-6)
    assert 0 < num_spared < 45


@pytest.mark.parametrize("kind", ["muon", "normuon"])
def test_muons_cautious_decay_takes_from_where_its_own_step_goes_to_zero(kind):
    flags = {"optimizer": kind, "clip_grad": 0.0}
    named, plain = parameters(), parameters()
    start = named["dense.weight"].detach().clone()
    weight, = stepped(named, Optimizer(named, OptimizerConfig(
        weight_decay=DECAY, cautious_weight_decay=True, **flags)), (1.0,))
    moved, = stepped(plain, Optimizer(plain, OptimizerConfig(weight_decay=0.0, **flags)), (1.0,))
    update = (start - moved).numpy()
    for place in np.ndindex(update.shape):
        x = start[place].item()
        agrees = update[place] * x >= 0
        assert weight[place].item() == pytest.approx(x - update[place] - RATE * DECAY * x * agrees, abs=1e-6)


@pytest.mark.parametrize("gradient", [1.0, math.inf], ids=["abnormal", "not finite"])
@pytest.mark.parametrize("kind", ["adam", "muon"])
def test_a_step_that_is_not_taken_decays_nothing_cautiously(kind, gradient):
    named = parameters()
    optimizer = Optimizer(named, OptimizerConfig(optimizer=kind, weight_decay=DECAY, cautious_weight_decay=True))
    before = stepped(named, optimizer)[-1]
    for parameter in named.values():
        parameter.grad = torch.full_like(parameter, gradient)
    assert not optimizer.step(RATE, SCALE, lambda norm: torch.tensor(False)).is_taken
    assert torch.equal(named["dense.weight"], before)


@pytest.mark.parametrize("kind", ["adam", "muon"])
def test_a_weight_that_the_step_does_not_move_decays_cautiously_too(kind):
    named = parameters()
    optimizer = Optimizer(named, OptimizerConfig(optimizer=kind, weight_decay=DECAY, cautious_weight_decay=True))
    before = named["dense.weight"].detach().clone()
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(RATE, SCALE)
    torch.testing.assert_close(named["dense.weight"].detach(), before * (1 - RATE * DECAY))


def test_cautious_decay_goes_on_from_the_optimizers_state_bitwise():
    config = OptimizerConfig(weight_decay=DECAY, cautious_weight_decay=True)
    one, two = parameters(), parameters()
    first, second = Optimizer(one, config), Optimizer(two, config)
    stepped(one, first)
    second.load_state({key: tensor.clone() for key, tensor in first.state().items()})
    for name, parameter in two.items():
        parameter.data.copy_(one[name].data)
    assert all(map(torch.equal, stepped(one, first, (3.0, -1.0)), stepped(two, second, (3.0, -1.0))))


@pytest.fixture
def apex(monkeypatch):
    """A stand-in for what needs CUDA: it takes the decay from its groups, as apex does."""
    module = types.SimpleNamespace(FusedAdam=torch.optim.AdamW, FusedSGD=torch.optim.SGD)
    monkeypatch.setitem(sys.modules, "apex", types.SimpleNamespace(optimizers=module))
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)


@pytest.mark.parametrize("flags", [
    {"optimizer": "adam"}, {"optimizer": "sgd"}, {"optimizer": "muon"}, {"optimizer_backend": "apex"}])
def test_a_course_of_the_decay_gives_each_step_the_decay_of_its_moment(flags, apex):
    ours, theirs, config = parameters(), parameters(), OptimizerConfig(weight_decay=0.0, **flags)
    factors, decays = (1.0, -2.0, 0.5), (0.0, 0.4, 0.8)
    weights = stepped(ours, Optimizer(ours, config, varies_decay=True), factors, decays=decays)
    plain = Optimizer(theirs, config)
    torch.manual_seed(1)
    for factor, value, weight in zip(factors, decays, weights, strict=True):
        for parameter in theirs.values():
            parameter.grad = torch.randn_like(parameter) * factor
        theirs["dense.weight"].data.mul_(1 - RATE * value)
        plain.step(RATE, SCALE)
        torch.testing.assert_close(weight, theirs["dense.weight"].detach())
    assert torch.equal(ours["dense.bias"], theirs["dense.bias"])


@pytest.mark.parametrize(("flags", "words"), [
    ({"optimizer": "sgd"}, "the optimizer is sgd by torch"), ({"optimizer_backend": "apex"}, "adam by apex")])
def test_an_optimizer_that_knows_no_cautious_decay_is_refused(flags, words):
    with pytest.raises(ConfigError, match=words):
        OptimizerConfig(cautious_weight_decay=True, **flags).filled()
