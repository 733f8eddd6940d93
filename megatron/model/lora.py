"""Adds low-rank adapters to a model (LoRA: Hu et al., 2021, arXiv 2106.09685), in any parallel layout.

    adapt(model, LoraConfig(lora_rank=8))       before data parallelism wraps the model
    initialise(adapters_in(parameters), seed)   while `load_model` fills the other weights from a checkpoint

Adapt a model, or a pipeline stage, directly after building it, on `meta` or with values: before its optimizer and the
compute copies of its weights are created.
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
# For each layer of a block the parts that may be adapted, in the order of their rows.
PARTS: Mapping[str, tuple[str, ...]] = {
    "attention.query_key_value": ("query", "key", "value"), "attention.dense": ("dense",), "mlp.gate": ("gate",),
    "mlp.dense_h_to_4h": ("dense_h_to_4h",), "mlp.dense_4h_to_h": ("dense_4h_to_h",)}
_MARK = ".adapters."


def adapt(model: ProteinModel, config: LoraConfig) -> None:
    """Freeze a model, and add adapters, without values yet, to those layers of its blocks that are targets.

    The adapters' trained parameters are LAYER.adapters.TARGET.a.weight [r, i] and .b.weight [o, r]; they share the
    layer's mode, device and ranks. Raises ConfigError if the model lacks a target.
    """
    assert config.lora_rank is not None, "adapters need a rank"
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
    """The targets that a model of this configuration has."""
    return tuple(target for target in LORA_TARGETS if target != "gate" or config.swiglu)


def adapted_layers(config: ModelConfig, lora: LoraConfig) -> Iterator[tuple[str, Adapters]]:
    """The name of each layer that would get adapters in a model of this configuration, and these, on `meta`.

    Raises ConfigError if the model lacks a target.
    """
    with torch.device("meta"):
        built = ProteinModel(replace(config, make_vocab_size_divisible_by=1), PrecisionConfig(), 1, mask_id=0)
    adapt(built, lora)
    for name, adapters in built.named_modules():
        if isinstance(adapters, Adapters):
            yield name.removesuffix(".adapters"), adapters


def adapters_in(tensors: Mapping[str, T]) -> dict[str, T]:
    """The tensors whose names, those of a model's parameters, are adapters'."""
    return {name: tensor for name, tensor in tensors.items() if _MARK in name}
