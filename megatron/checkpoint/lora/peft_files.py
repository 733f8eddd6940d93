"""Writes low-rank adapters in peft's files, for models that transformers loads (`convert.families`).

FOLDER/adapter_config.json          rank, scale, dropout, targets
FOLDER/adapter_model.safetensors    base_model.model.MODULE.lora_A.weight [r, i] and .lora_B.weight [o, r]

We have separate adapters for queries, keys and values. In models of transformers these are three modules, and the
adapters correspond one to one. In a model of our own class they are one module, and the three adapters are written as
one of rank 3 r, with A the three A stacked and B block-wise, zero elsewhere.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.contents import Tensors, stored
from megatron.checkpoint.convert.families.flags import OWN, family_of
from megatron.checkpoint.convert.families.hf_writing import TABLES
from megatron.checkpoint.convert.families.names import their_names
from megatron.checkpoint.failures import new_checkpoint
from megatron.checkpoint.lora.merging import stored_pair
from megatron.checkpoint.tensor_file import write_tensors
from megatron.config import ModelConfig
from megatron.config.lora import LoraConfig
from megatron.files import write_json
from megatron.model.lora import adapted_layers
from megatron.parallel.tensor.adapters import Adapters, Pair, in_turns

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _FUSED = "base_model.model.", "query_key_value"
_LAYER = re.compile(r"\.[0-9]+\.")


def write(folder: Path, tensors: Tensors, lora: LoraConfig, model: ModelConfig, base: str | None = None) -> Path:
    """Write adapters into a new folder in peft's format; returns the folder.

    `tensors`: under our names; `model`: the configuration of the model they belong to; `base`: the path or name of that
    model, for peft. The pattern of the targets has the whole names of modules, so that peft refuses a class in which
    they have others. Raises CheckpointError if the disk refuses.
    """
    is_own = family_of(vars(model)) == OWN
    theirs: dict[str, Tensor] = {}
    for name, modules, adapters in _layers(model, lora):
        pairs = [None if adapter is None else _pair(tensors, name, part)
                 for part, adapter in zip(adapters.uses, adapters.of_parts(), strict=True)]
        if len(modules) < len(pairs):
            pairs = [_joined(pairs, adapters.runs)]
        for module, pair in zip(modules, pairs, strict=True):
            theirs |= {} if pair is None else {f"{module}.lora_A.weight": pair[0], f"{module}.lora_B.weight": pair[1]}
    alike = sorted({_LAYER.sub(".N.", name.rpartition(".lora_")[0]) for name in theirs})
    config = {
        "peft_type": "LORA", "base_model_name_or_path": base, "r": lora.lora_rank, "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout, "use_rslora": lora.lora_rslora, "bias": "none", "inference_mode": True,
        "target_modules": "|".join(re.escape(name).replace(r"\.N\.", r"\.\d+\.") for name in alike),
        **(_patterns(lora) if is_own else {})}
    with new_checkpoint(folder) as temporary:
        write_json(temporary / CONFIG, config)
        write_tensors(temporary / WEIGHTS, {f"{_PREFIX}{name}": stored(tensor)
                                            for name, tensor in theirs.items()}, {"format": "pt"})
    return folder


def _layers(model: ModelConfig, lora: LoraConfig) -> Iterator[tuple[str, list[str], Adapters]]:
    """Each adapted layer of a model: its name here, the names of the modules it is in transformers, its adapters."""
    table = TABLES[family_of(vars(model))]
    for layer, adapters in adapted_layers(model, lora):
        yield layer, [module.removesuffix(".weight") for module in their_names(f"{layer}.weight", table)], adapters


def _pair(tensors: Tensors, layer: str, part: str) -> Pair:
    a, b = stored_pair(tensors, layer, part)
    return a.read(), b.read()


def _joined(pairs: list[Pair | None], runs: tuple[int, ...]) -> Pair:
    """One adapter of rank 3 r that computes what those of the three parts do; a part without one (None) gets zeros.

    `runs`: as in `Adapters`, how the outputs of the parts alternate in the joint layer.
    """
    rank, width = next(pair[0].shape for pair in pairs if pair is not None)
    all_a = [torch.zeros(rank, width) if pair is None else pair[0] for pair in pairs]
    all_b = [None if pair is None else torch.cat([pair[1] if at == place else torch.zeros_like(pair[1])
                                                  for at in range(len(pairs))], 1).t()
             for place, pair in enumerate(pairs)]
    return torch.cat(all_a), in_turns(all_b, runs).t()


def _patterns(lora: LoraConfig) -> dict[str, dict[str, float]]:
    """The entries of adapter_config.json for joint adapters of queries, keys and values: rank 3 r, the same scale."""
    assert lora.lora_rank is not None
    alpha = lora.lora_alpha * (math.sqrt(3) if lora.lora_rslora else 3)
    return {"rank_pattern": {_FUSED: 3 * lora.lora_rank}, "alpha_pattern": {_FUSED: alpha}}
