"""Low-rank adapters (LoRA: Hu et al., 2021, arXiv 2106.09685) for a model as it is built, on whatever ranks it lies.

    adapt(model, LoraConfig(lora_rank=8))       before data parallelism shares the model out
    initialise(adapters_in(parameters), seed)   and its own weights from a checkpoint, by `load_model`

A model is adapted as it is built, a pipeline stage like the whole, on `meta` or with values, before an optimizer or the
copies of its weights are made.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

import torch

from megatron.config import ModelConfig, PrecisionConfig
from megatron.config.lora import LORA_TARGETS, LoraConfig
from megatron.errors import ConfigError
from megatron.kernels.dropout import Use
from megatron.model.protein_model import ProteinModel
from megatron.parallel.tensor.adapters import Adapters, SplitLinear

T = TypeVar("T")
# Of a block's layers the parts that may be adapted, in the order of their rows.
PARTS: Mapping[str, tuple[str, ...]] = {
    "attention.query_key_value": ("query", "key", "value"), "attention.dense": ("dense",), "mlp.gate": ("gate",),
    "mlp.dense_h_to_4h": ("dense_h_to_4h",), "mlp.dense_4h_to_h": ("dense_4h_to_h",)}
_MARK = ".adapters."


def adapt(model: ProteinModel, config: LoraConfig) -> None:
    """Freeze all of a model, and give its blocks' layers that are targets adapters, which are without values as yet.

    They are parameters named LAYER.adapters.TARGET.a.weight [r, i] and .b.weight [o, r], trained, of the same mode,
    device and ranks as their layer. Raises ConfigError where the model lacks a target.
    """
    assert config.lora_rank is not None, "who adapts says the rank"
    targets = frozenset(config.lora_targets)
    if missing := targets - {*possible_targets(model.config)}:
        raise ConfigError(f"--lora-targets has {min(missing)}, which goes with --swiglu, and the model is without; "
                          "leave it out")
    model.requires_grad_(False)
    for block, path in itertools.product(model.blocks(), PARTS):
        if targets & {*PARTS[path]}:
            layer = block.get_submodule(path)
            assert isinstance(layer, SplitLinear)
            with torch.device(layer.weight.device):
                adapters = Adapters(layer, {part: Use[f"ADAPTED_{part.upper()}"] for part in PARTS[path]}, targets,
                                    config.lora_rank, config.scale, config.lora_dropout)
            layer.adapters = adapters.train(layer.training)
            if config.lora_dropout:
                block.register_forward_pre_hook(adapters.take_seed)


def possible_targets(config: ModelConfig) -> tuple[str, ...]:
    """The layers of such a model that may have adapters."""
    return tuple(target for target in LORA_TARGETS if target != "gate" or config.swiglu)


def adapted_layers(config: ModelConfig, lora: LoraConfig) -> Iterator[tuple[str, Adapters]]:
    """The name of each layer of such a model that has adapters, and these, without values.

    Raises ConfigError where the model lacks a target.
    """
    with torch.device("meta"):
        built = ProteinModel(replace(config, make_vocab_size_divisible_by=1), PrecisionConfig(), 1, mask_id=0)
    adapt(built, lora)
    for name, adapters in built.named_modules():
        if isinstance(adapters, Adapters):
            yield name.removesuffix(".adapters"), adapters


def adapters_in(tensors: Mapping[str, T]) -> dict[str, T]:
    """Those of tensors by their names in a model that are adapters'."""
    return {name: tensor for name, tensor in tensors.items() if _MARK in name}
