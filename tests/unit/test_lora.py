"""LoRA adapters of a model: what they add, which weights stay unchanged, and merging."""

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from megatron.checkpoint.contents import Checkpoint, stored
from megatron.checkpoint.loading import load_model
from megatron.checkpoint.lora.merging import STATE, merged
from megatron.config import PrecisionConfig
from megatron.config.command_line import OneLineParser, add_section_flags
from megatron.config.lora import LORA_TARGETS, LoraConfig
from megatron.errors import CheckpointError, ConfigError
from megatron.kernels.dropout import Use
from megatron.model.initialisation import initialise
from megatron.model.lora import adapt, adapters_in
from megatron.model.protein_model import ProteinModel
from megatron.parallel.parameters import Normal
from megatron.parallel.pipeline.partition import Stage
from megatron.parallel.tensor.adapters import Adapters
from megatron.parallel.tensor.layers import ColumnParallelLinear, RowParallelLinear
from megatron.parallel.tensor.stream import ONE_RANK_STREAM
from tests.families import FAMILIES, MASK_ID
from tests.packed import packed_batch
from tests.philox import kept

LORA = LoraConfig(lora_rank=3, lora_alpha=6.0)
WITHOUT_GATE = tuple(target for target in LORA_TARGETS if target != "gate")
ALL = {name: replace(LORA, lora_targets=LORA_TARGETS if config.swiglu else WITHOUT_GATE)
       for name, config in FAMILIES.items()}
SEED = 0x5DEECE66D1234567


def built(family, lora=None, precision=PrecisionConfig(), stage=None, seed=1):  # noqa: B008
    """A model with initial values, of adapters too where they are asked for."""
    model = ProteinModel(FAMILIES[family], precision, 32, stage=stage, mask_id=MASK_ID)
    initialise(dict(model.named_parameters()), seed)
    if lora is not None:
        adapt(model, lora)
        initialise(adapters_in(dict(model.named_parameters())), seed)
    return model


def varied(model):
    """The same with adapters none of which is without effect."""
    for name, parameter in sorted(adapters_in(dict(model.named_parameters())).items()):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return model


def adapted_layer(kind, rate=0.0):
    """A layer of 20 features into 30, with an adapter of s = 1.5."""
    layer = kind(20, 30, ONE_RANK_STREAM, Normal(0.02))
    layer.adapters = Adapters(layer, {"dense": Use.ADAPTED_DENSE}, frozenset(["dense"]), 4, 1.5, rate)
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def logits(model):
    with torch.no_grad():
        return model.logits(model.hidden(packed_batch(7, 1, 12, 4).sequence))


@pytest.mark.parametrize("family", FAMILIES)
def test_at_first_the_model_computes_what_it_did(family):
    assert torch.equal(logits(built(family, ALL[family])), logits(built(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_alone_have_gradients(family):
    model = varied(built(family, ALL[family]))
    batch = packed_batch(7, 1, 12, 4)
    model(batch.sequence, batch.targets)[0].backward()
    for name, parameter in model.named_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.any())
        assert has_gradient == parameter.requires_grad == (".adapters." in name), name


def test_a_stage_has_the_adapters_of_its_blocks_with_the_values_of_the_whole():
    whole = adapters_in(dict(built("esm2", LORA).named_parameters()))
    stages = [built("esm2", LORA, stage=Stage(number, 2, layers))
              for number, layers in enumerate([range(1), range(1, 4)])]
    parts = [adapters_in(dict(stage.named_parameters())) for stage in stages]
    assert parts[0].keys() | parts[1].keys() == whole.keys() and not parts[0].keys() & parts[1].keys()
    assert all(torch.equal(part[name], whole[name]) for part in parts for name in part)


def test_a_is_drawn_as_torch_draws_a_linear_layer_and_b_is_0():
    layer = ColumnParallelLinear(400, 90, ONE_RANK_STREAM, Normal(0.02))
    adapters = Adapters(layer, {"dense": Use.ADAPTED_DENSE}, frozenset(["dense"]), 50, 1.0, 0.0)
    initialise(dict(adapters.named_parameters()), 1)
    a, theirs = adapters.dense.a.weight, torch.nn.Linear(400, 50).weight
    assert a.shape == theirs.shape and not adapters.dense.b.weight.any()
    for ours, torchs in ((a.abs().max(), theirs.abs().max()), (a.std(), theirs.std())):
        assert ours.item() == pytest.approx(torchs.item(), rel=0.02)


@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
def test_what_is_added_is_the_paper_s_formula_with_dropout_of_the_input(kind):
    layer, x = adapted_layer(kind, 0.25), torch.randn(9, 20)
    layer.adapters.seed = torch.tensor(SEED)
    keeps = torch.from_numpy(kept(SEED, 0.25, range(9), range(20), range(1), int(Use.ADAPTED_DENSE))[0])
    a, b = layer.adapters.dense.a.weight, layer.adapters.dense.b.weight
    expected = F.linear(x, layer.weight, layer.bias) + 1.5 * (x * keeps / 0.75) @ a.T @ b.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_query_key_and_value_have_dropout_of_their_own_and_a_copy_of_a_model_its_own():
    lora = replace(LORA, lora_dropout=0.5)
    batch = packed_batch(7, 1, 12, 4, seed=3)
    model = varied(built("esm2", lora))
    first = model(batch.sequence, batch.targets)[0]
    assert torch.equal(copy.deepcopy(model)(batch.sequence, batch.targets)[0], first)
    other = replace(batch.sequence, seed=batch.sequence.seed + 100)
    assert not torch.equal(model(other, batch.targets)[0], first)
    layer = ColumnParallelLinear(64, 30, ONE_RANK_STREAM, Normal(0.02), runs=(2, 2, 2))
    uses = {"query": Use.ADAPTED_QUERY, "key": Use.ADAPTED_KEY, "value": Use.ADAPTED_VALUE}
    adapters = Adapters(layer, uses, frozenset(uses), 4, 1.0, 0.5)
    adapters.seed = torch.tensor(SEED)
    for parameter in adapters.parameters():
        torch.nn.init.ones_(parameter)
    query_key_value = adapters(torch.rand(9, 64)).detach().view(9, 5, 3, 2)[:, 0, :, 0]
    assert len(np.unique(query_key_value)) == 27


@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
def test_in_bf16_gradients_are_fp32_and_near_those_of_fp32(kind):
    layer, x = adapted_layer(kind), torch.randn(50, 20)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        output = layer(x.to(dtype))
        assert output.dtype == dtype
        output.square().sum().backward()
        gradients.append([parameter.grad for parameter in layer.parameters()])
        layer.zero_grad()
    for exact, rounded in zip(*gradients, strict=True):
        assert rounded.dtype == torch.float32 and 0 < (rounded - exact).norm() < 1.5e-2 * exact.norm()


def test_scales_are_alpha_over_rank_or_over_its_root():
    assert (LORA.scale, replace(LORA, lora_rank=4, lora_rslora=True).scale) == (2.0, 3.0)


def test_the_flags_are_those_of_the_section():
    parser = OneLineParser()
    add_section_flags(parser, LoraConfig)
    given = vars(parser.parse_args("--lora-rank 4 --lora-alpha 8 --lora-dropout 0.1 --lora-targets key gate".split()))
    assert LoraConfig(**given) == LoraConfig(4, 8.0, 0.1, ["key", "gate"])
    with pytest.raises(ConfigError, match="--lora-targets.*invalid choice: 'head'"):
        parser.parse_args(["--lora-targets", "head"])


def test_a_target_that_the_model_has_not_is_refused():
    with pytest.raises(ConfigError, match="--lora-targets has gate, which goes with --swiglu"):
        built("esm2", replace(LORA, lora_targets=("key", "gate")))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_checkpoint_is_of_a_plain_model_with_the_same_logits(family):
    model, plain = varied(built(family, ALL[family])).eval(), built(family)
    tensors = {name: stored(parameter.clone()) for name, parameter in model.named_parameters()}
    checkpoint = Checkpoint(Path("x"), 3, tensors, None,
                            {STATE: json.loads(json.dumps(asdict(ALL[family]))), "more": 1})
    found = merged(checkpoint, model.config)
    parameters, without = dict(plain.named_parameters()), logits(plain)
    assert found.model.keys() == parameters.keys() and found.state == {"more": 1}
    load_model(parameters, found, parameters.keys())
    assert (logits(model) - logits(plain)).abs().max() < 1e-5 < (logits(model) - without).abs().max()
    assert merged(found, model.config) is found
    with pytest.raises(CheckpointError, match="x has adapters, of which its state.json does not say all"):
        merged(replace(checkpoint, state={}), model.config)
