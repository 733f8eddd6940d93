"""The optimizers and the loss scale."""

import sys
import types

import pytest
import torch

from megatron.config import OptimizerConfig, PrecisionConfig
from megatron.errors import ConfigError
from megatron.optim.optimizer import Optimizer
from megatron.optim.scaling import LossScale
from megatron.parallel.parameters import BIAS, SCALE, Normal, matrix, whole_parameter

CPU = torch.device("cpu")


def parameters():
    torch.manual_seed(0)
    named = {"dense.weight": whole_parameter((4, 3), matrix(Normal(0.02))), "dense.bias": whole_parameter((4,), BIAS),
             "layernorm.weight": whole_parameter((3,), SCALE)}
    for parameter in named.values():
        parameter.data.normal_()
    return named


def set_gradients(named, factor=1.0):
    torch.manual_seed(1)
    for parameter in named.values():
        parameter.grad = torch.randn_like(parameter) * factor


def test_weight_decay_spares_biases_and_layernorms():
    named = parameters()
    optimizer = Optimizer(named, OptimizerConfig(weight_decay=0.5, clip_grad=0.0))
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.1, LossScale(PrecisionConfig(), CPU))
    torch.testing.assert_close(named["dense.weight"].data, before["dense.weight"] * 0.95)
    assert torch.equal(named["dense.bias"], before["dense.bias"])
    assert torch.equal(named["layernorm.weight"], before["layernorm.weight"])


def test_sgd_decays_beside_its_momentum():
    named = parameters()
    expected = {name: parameter.detach().double() for name, parameter in named.items()}
    momentum = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    optimizer = Optimizer(named, OptimizerConfig(optimizer="sgd", weight_decay=0.5, clip_grad=0.0))
    for factor in (1.0, -2.0, 0.5):
        set_gradients(named, factor)
        for name, weight in expected.items():
            momentum[name] = 0.9 * momentum[name] + named[name].grad.double()
            decay = 0.5 if name == "dense.weight" else 0.0
            expected[name] = weight - 0.1 * (momentum[name] + decay * weight)
        optimizer.step(0.1, LossScale(PrecisionConfig(), CPU))
    for name, weight in expected.items():
        torch.testing.assert_close(named[name].detach().double(), weight, rtol=1e-6, atol=1e-7)


def test_parameters_are_grouped_by_what_they_declare():
    optimizer = Optimizer(parameters(), OptimizerConfig(weight_decay=0.5))
    inner, = optimizer.inner
    groups = [(group["group"], group["weight_decay"], len(group["params"])) for group in inner.param_groups]
    assert groups == [("matrix", 0.5, 1), ("vector", 0.0, 2)]


def test_a_frozen_parameter_neither_moves_nor_decays_nor_counts_in_the_norm():
    named = parameters()
    named["dense.weight"].requires_grad_(False)
    before = named["dense.weight"].clone()
    optimizer = Optimizer(named, OptimizerConfig(weight_decay=0.5))
    set_gradients({name: parameter for name, parameter in named.items() if parameter.requires_grad})
    expected = sum(parameter.grad.square().sum() for parameter in named.values() if parameter.requires_grad) ** 0.5
    assert optimizer.step(0.1, LossScale(PrecisionConfig(), CPU)).grad_norm.item() == pytest.approx(expected.item())
    assert torch.equal(named["dense.weight"], before)
    assert {key.split("/")[1] for key in optimizer.state()} == {"dense.bias", "layernorm.weight"}


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_clipping_and_scale_give_what_plain_torch_gives_on_the_true_gradient(kind):
    ours, theirs = parameters(), parameters()
    config = OptimizerConfig(optimizer=kind, weight_decay=0.0, clip_grad=0.3)
    optimizer = Optimizer(ours, config)
    plain = (torch.optim.AdamW(theirs.values(), lr=0.01, weight_decay=0.0) if kind == "adam"
             else torch.optim.SGD(theirs.values(), lr=0.01, momentum=0.9))
    scale = LossScale(PrecisionConfig(fp16=True, loss_scale=64.0), CPU)
    for _ in range(3):
        set_gradients(ours, 64.0)
        outcome = optimizer.step(0.01, scale)
        set_gradients(theirs)
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 0.3)
        plain.step()
        assert outcome.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
        assert ours[name].grad is None


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("kind", ["adam", "sgd", "muon", "normuon"])
def test_a_step_that_is_not_finite_changes_nothing(kind, bad):
    named = parameters()
    optimizer = Optimizer(named, OptimizerConfig(optimizer=kind))
    scale = LossScale(PrecisionConfig(), CPU)
    set_gradients(named)
    optimizer.step(0.1, scale)
    weights = {name: parameter.detach().clone() for name, parameter in named.items()}
    state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    set_gradients(named)
    named["dense.bias"].grad[2] = named["dense.weight"].grad[1, 1] = bad
    assert not optimizer.step(0.1, scale).is_taken
    assert all(torch.equal(named[name], weights[name]) for name in named)
    assert all(torch.equal(tensor, state[name]) for name, tensor in optimizer.state().items()
               if (kind, name) not in (("muon", "step/dense.weight"), ("normuon", "step/dense.weight")))


def test_a_step_that_is_skipped_as_abnormal_leaves_the_loss_scale_alone():
    named = parameters()
    scale = LossScale(PrecisionConfig(fp16=True, hysteresis=1, initial_loss_scale=1024.0), CPU)
    set_gradients(named)
    assert not Optimizer(named, OptimizerConfig()).step(0.1, scale, lambda norm: torch.tensor(False)).is_taken
    assert scale.value == 1024


@pytest.mark.parametrize("kind", ["adam", "sgd", "muon", "normuon"])
def test_a_first_step_that_is_not_taken_leaves_the_next_one_the_first(kind, monkeypatch):
    skips, does_not = parameters(), parameters()
    scale = LossScale(PrecisionConfig(), CPU)
    one, other = (Optimizer(named, OptimizerConfig(optimizer=kind, muon_momentum_warmup_iters=0))
                  for named in (skips, does_not))
    set_gradients(skips, float("inf"))
    empty_like = torch.empty_like  # whose memory may hold anything
    monkeypatch.setattr(torch, "empty_like", lambda *given, **options: empty_like(*given, **options).fill_(1e3))
    assert not one.step(0.1, scale).is_taken
    for named, optimizer in ((skips, one), (does_not, other)):
        set_gradients(named)
        optimizer.step(0.1, scale)
    for name, parameter in does_not.items():
        torch.testing.assert_close(skips[name], parameter, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["adam", "sgd", "muon", "normuon"])
def test_an_optimizer_goes_on_from_its_state_bitwise(kind):
    first, second = parameters(), parameters()
    scale = LossScale(PrecisionConfig(), CPU)
    one, two = (Optimizer(named, OptimizerConfig(optimizer=kind)) for named in (first, second))
    set_gradients(first)
    one.step(0.1, scale)
    two.load_state({name: tensor.clone() for name, tensor in one.state().items()})
    for name in second:
        second[name].data.copy_(first[name].data)
    for named, optimizer in ((first, one), (second, two)):
        set_gradients(named, 0.5)
        optimizer.step(0.1, scale)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_apex_is_asked_for_by_name_and_its_absence_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(ConfigError, match="--optimizer-backend apex: apex cannot be imported.*give torch"):
        Optimizer(parameters(), OptimizerConfig(optimizer_backend="apex"))


class StandInForApex(torch.optim.AdamW):
    """AdamW that counts steps a group, as apex's FusedAdam does. Apex itself needs CUDA."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if self.state[parameter]:
                    self.state[parameter]["step"] = torch.tensor(float(group["step"] - 1))
        return super().step(closure)

    def zero_grad(self):
        """Theirs knows no set_to_none."""
        super().zero_grad()


def test_apex_takes_the_same_steps_and_goes_on_from_its_state(monkeypatch):
    module = types.SimpleNamespace(FusedAdam=StandInForApex, FusedSGD=torch.optim.SGD)
    monkeypatch.setitem(sys.modules, "apex", types.SimpleNamespace(optimizers=module))
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)
    scale = LossScale(PrecisionConfig(), CPU)
    ours, theirs = parameters(), parameters()
    optimizers = [Optimizer(ours, OptimizerConfig()),
                  Optimizer(theirs, OptimizerConfig(optimizer_backend="apex"))]
    for _ in range(2):
        for named, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_gradients(named, 3.0)
            optimizer.step(0.1, scale)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])
    resumed = Optimizer(theirs, OptimizerConfig(optimizer_backend="apex"))
    resumed.load_state(optimizers[0].state())
    assert [group["step"] for group in resumed.inner[0].param_groups] == [2, 2]


def scale_after(outcomes, **flags):
    scale = LossScale(PrecisionConfig(fp16=True, **flags), CPU)
    for outcome in outcomes:
        scale.update(torch.tensor(outcome))
    return scale.value.item()


def test_the_scale_halves_when_overflows_use_up_the_hysteresis():
    flags = {"initial_loss_scale": 1024.0, "hysteresis": 2, "loss_scale_window": 3}
    assert scale_after([False], **flags) == 1024
    assert scale_after([False, False], **flags) == 512
    assert scale_after([False, False, False], **flags) == 256
    assert scale_after([False, True, False], **flags) == 512
    assert scale_after([False] * 30, **flags, min_loss_scale=8.0) == 8


def test_the_scale_doubles_after_a_window_without_overflow():
    flags = {"initial_loss_scale": 16.0, "loss_scale_window": 3}
    assert scale_after([True] * 2, **flags) == 16
    assert scale_after([True] * 3, **flags) == 32
    assert scale_after([True] * 2 + [False] + [True] * 2, **flags) == 16
    assert scale_after([True] * 6, **flags) == 64


def test_doubling_gives_back_the_hysteresis():
    flags = {"initial_loss_scale": 16.0, "hysteresis": 2, "loss_scale_window": 2}
    assert scale_after([False, True, True, False], **flags) == 32
    assert scale_after([False, True, True, False, False], **flags) == 16


def test_the_scale_is_one_outside_fp16_and_fixed_where_told():
    assert LossScale(PrecisionConfig(bf16=True), CPU).value == 1
    assert scale_after([False] * 5, loss_scale=128.0) == 128


def test_the_scale_goes_on_from_its_state():
    scale = LossScale(PrecisionConfig(fp16=True), CPU)
    scale.update(torch.tensor(False))
    other = LossScale(PrecisionConfig(fp16=True), CPU)
    other.load_state(scale.state())
    other.update(torch.tensor(False))
    assert other.value == 2.0**31
