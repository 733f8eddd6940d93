"""Muon and NorMuon agree with their definitions, on one rank.

`tests/golden/test_muon.py` tests them in layouts of several.
"""

import pytest
import torch

from megatron.config import ModelConfig, OptimizerConfig, PrecisionConfig
from megatron.config.command_line import parse
from megatron.errors import ConfigError
from megatron.kernels.newton_schulz.orthogonal import COEFFICIENTS
from megatron.model.protein_model import ProteinModel
from megatron.optim.optimizer import Optimizer
from megatron.optim.scaling import LossScale
from megatron.parallel.parameters import BIAS, Normal, matrix, whole_parameter

SCALE = LossScale(PrecisionConfig(), torch.device("cpu"))
FLAGS = "--preset demo --optimizer".split()


def stepped(gradients, *, runs=(), rate=0.1, **flags):
    """The steps that a matrix of zeros takes along `gradients`, one after another."""
    weight = whole_parameter(gradients[0].shape, matrix(Normal(0.02), runs))
    weight.data.zero_()
    optimizer = Optimizer({"weight": weight}, OptimizerConfig(clip_grad=0.0, **flags))
    steps = []
    for gradient in gradients:
        before, weight.grad = weight.detach().clone(), gradient.clone()
        optimizer.step(rate, SCALE)
        steps.append(weight.detach() - before)
    return steps


def orthogonalised(x, num_steps=3):
    left, values, right = torch.linalg.svd(x.double(), full_matrices=False)
    values = values / values.norm()
    for a, b, c in COEFFICIENTS[:num_steps]:
        values = a * values + b * values**3 + c * values**5
    return left * values @ right


def test_steps_follow_the_definition_with_a_momentum_that_rises():
    torch.manual_seed(0)
    gradients = [torch.randn(12, 30) for _ in range(4)]
    buffer = torch.zeros(12, 30, dtype=torch.float64)
    ours = stepped(gradients, optimizer="muon", weight_decay=0.0, muon_momentum_warmup_iters=3)
    for number, (gradient, step) in enumerate(zip(gradients, ours, strict=True)):
        momentum = 0.85 + 0.1 * min(1, (number + 1) / 3)
        buffer = momentum * buffer + (1 - momentum) * gradient
        expected = -0.1 * orthogonalised((1 - momentum) * gradient + momentum * buffer)
        torch.testing.assert_close(step.double(), expected, rtol=0, atol=5e-5)


def test_a_momentum_below_that_of_the_warm_ups_start_is_constant():
    torch.manual_seed(0)
    gradients = [torch.randn(6, 4) for _ in range(3)]
    rising, constant = (stepped(gradients, optimizer="muon", muon_momentum=0.5, muon_momentum_warmup_iters=warmup)
                        for warmup in (3, 0))
    assert all(map(torch.equal, rising, constant))


def test_normuon_follows_its_definition_and_steps_as_far_as_muon():
    torch.manual_seed(1)
    gradients = [torch.randn(30, 12) for _ in range(3)]
    flags = {"weight_decay": 0.0, "muon_momentum": 0.0}
    plain = stepped(gradients, optimizer="muon", **flags)
    moment = torch.zeros(30, 1)
    for step, even in zip(plain, stepped(gradients, optimizer="normuon", **flags), strict=True):
        moment = 0.95 * moment + 0.05 * step.square().mean(1, keepdim=True)
        expected = step / moment.sqrt()
        torch.testing.assert_close(even, expected * step.norm() / expected.norm(), rtol=1e-4, atol=1e-6)


def test_steps_go_where_those_of_torchs_own_muon_go_which_leaves_singular_values_elsewhere_around_one():
    torch.manual_seed(2)
    gradients = [torch.randn(40, 24) for _ in range(3)]
    theirs = torch.nn.Parameter(torch.zeros(40, 24))
    optimizer = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0, momentum=0.95)
    flags = {"weight_decay": 0.0, "muon_momentum_warmup_iters": 0, "muon_num_ns_steps": 5}
    steps = stepped(gradients, optimizer="muon", **flags)
    for gradient in gradients:
        theirs.grad = gradient.clone()
        optimizer.step()
    ours, reached = sum(steps), theirs.detach()
    assert (ours * reached).sum() > 0.92 * ours.norm() * reached.norm()
    assert ours.norm().item() == pytest.approx(reached.norm().item(), rel=0.2)


def test_a_step_is_as_long_at_any_width():
    """An input of mean square 1 that it does not map to 0 changes an output by about lr, whatever the shape."""
    torch.manual_seed(3)
    for rows, columns in ((16, 16), (64, 16), (256, 64), (16, 64), (16, 256)):
        step, = stepped([torch.randn(rows, columns)], optimizer="muon", weight_decay=0.0)
        length = torch.linalg.svdvals(step).square().mean().sqrt().item()
        assert length * min(1.0, columns / rows)**0.5 == pytest.approx(0.1, rel=0.4)


def test_matrices_whose_rows_take_turns_are_orthogonalised_each_by_itself():
    torch.manual_seed(4)
    gradient = torch.randn(2 * (4 + 2 + 2), 10) * torch.tensor([1.0] * 4 + [1e-3] * 2 + [1e3] * 2).repeat(2)[:, None]
    step, = stepped([gradient], runs=(4, 2, 2), optimizer="muon", weight_decay=0.0)
    for part, own in zip(step.view(2, 8, 10).split([4, 2, 2], 1), gradient.view(2, 8, 10).split([4, 2, 2], 1),
                         strict=True):
        torch.testing.assert_close(part.flatten(0, 1).double(), -0.1 * orthogonalised(own.flatten(0, 1)), rtol=0,
                                   atol=5e-5)


def test_weights_decay_beside_the_step():
    weight = whole_parameter((4, 3), matrix(Normal(0.02)))
    weight.data.normal_()
    before, weight.grad = weight.detach().clone(), torch.zeros(4, 3)
    Optimizer({"weight": weight}, OptimizerConfig(optimizer="muon", weight_decay=0.5)).step(0.1, SCALE)
    torch.testing.assert_close(weight.detach(), 0.95 * before)


@pytest.mark.parametrize("swiglu", [False, True])
def test_muon_steps_the_matrices_of_linear_layers_and_adamw_all_else(swiglu):
    config = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=4, num_query_groups=2, kv_channels=4,
                         ffn_hidden_size=32, max_position_embeddings=8, swiglu=swiglu,
                         untie_embeddings_and_output_weights=True)
    model = ProteinModel(config, PrecisionConfig(), 128)
    muon, adam = Optimizer(dict(model.named_parameters()), OptimizerConfig(optimizer="muon")).inner
    by_muon = {id(parameter) for group in muon.param_groups for parameter in group["params"]}
    names = {name.removesuffix(".weight").rpartition(".")[2] for name, parameter in model.named_parameters()
             if id(parameter) in by_muon}
    assert names == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"} | ({"gate"} if swiglu else set())
    assert len(by_muon) + sum(len(group["params"]) for group in adam.param_groups) == len(list(model.parameters()))
    fused = next(parameter for name, parameter in model.named_parameters() if "query_key_value.weight" in name)
    assert fused.declaration.runs == (8, 4, 4)


def test_a_rank_without_matrices_and_one_without_anything_else_take_their_steps():
    for declaration, shape in ((BIAS, (4,)), (matrix(Normal(0.02)), (4, 3))):
        parameter = whole_parameter(shape, declaration)
        parameter.data.zero_()
        parameter.grad = torch.ones(shape)
        assert Optimizer({"one": parameter}, OptimizerConfig(optimizer="muon")).step(0.1, SCALE).is_taken
        assert parameter.abs().min() > 0


def test_learning_rates_of_groups_have_defaults_under_muon_alone():
    def of(*flags):
        config = parse([*FLAGS, *flags])[0].optimizer
        return config.muon_lr, config.embedding_lr, config.head_lr, config.scalar_lr

    assert of("adam") == (None,) * 4
    assert of("muon", "--head-lr", "0.1") == (0.01, 0.02, 0.1, 5e-3)
    with pytest.raises(ConfigError, match="--muon-lr 0.1 is of --optimizer muon and normuon, which is adam"):
        of("adam", "--muon-lr", "0.1")
    with pytest.raises(ConfigError, match="--optimizer-backend apex has no normuon; give torch"):
        of("normuon", "--optimizer-backend", "apex")
