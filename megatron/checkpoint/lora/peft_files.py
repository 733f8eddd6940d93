"""Reads and writes low-rank adapters in peft's files, for models that transformers loads (`convert.families`).

FOLDER/adapter_config.json          rank, scale, dropout, targets
FOLDER/adapter_model.safetensors    base_model.model.MODULE.lora_A.weight [r, i] and .lora_B.weight [o, r]

We have separate adapters for queries, keys and values. In models of transformers these are three modules, and the
adapters correspond one to one. In a model of our own class they are one module, and the three adapters are written as
one of rank 3 r, with A the three A stacked and B block-wise, zero elsewhere. An adapter of rank r that peft trained on
that module is read as three adapters with the same A.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.convert.failures import writable
from megatron.checkpoint.convert.families.flags import OWN, family_of
from megatron.checkpoint.convert.families.hf import read_object
from megatron.checkpoint.convert.families.hf_writing import TABLES
from megatron.checkpoint.convert.families.names import their_names
from megatron.checkpoint.lora.merging import stored_pair
from megatron.checkpoint.stored import Checkpoint, Tensors, stored
from megatron.checkpoint.tensor_file import stored_in, write_tensors
from megatron.config import ModelConfig
from megatron.config.lora import LORA_TARGETS, LoraConfig
from megatron.errors import CheckpointError
from megatron.files import new_folder, write_json
from megatron.model.lora import adapted_layers, possible_targets
from megatron.parallel.tensor.adapters import Adapters, Pair, in_turns

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _FUSED = "base_model.model.", "query_key_value"
# Keys of adapter_config.json: those that are understood here, and those that do not change what the tensors mean.
_KNOWN = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern",
          "init_lora_weights"}
_FREE = {"auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
         "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform",
         "loftq_config", "lora_ga_config", "megatron_config", "megatron_core", "peft_version", "qalora_group_size",
         "revision", "target_modules", "task_type"}
_INITIAL = (True, False, "gaussian", "orthogonal", "eva")  # other initializations change the base weights too


def write(folder: Path, tensors: Tensors, lora: LoraConfig, model: ModelConfig, base: str | None = None) -> Path:
    """Write adapters into a new folder in peft's format; returns the folder.

    `tensors`: under our names; `model`: the configuration of the model they belong to; `base`: the path or name of that
    model, for peft. Raises CheckpointError if the disk refuses.
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
    ends = sorted({re.split(r"\.\d+\.", name)[1].rpartition(".lora_")[0] for name in theirs})
    config = {
        "peft_type": "LORA", "base_model_name_or_path": base, "r": lora.lora_rank, "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout, "use_rslora": lora.lora_rslora, "bias": "none", "inference_mode": True,
        "target_modules": rf".*\.\d+\.({'|'.join(map(re.escape, ends))})", **(_patterns(lora) if is_own else {})}
    with writable(folder), new_folder(folder) as temporary:
        write_json(temporary / CONFIG, config)
        write_tensors(temporary / WEIGHTS, {f"{_PREFIX}{name}": stored(tensor)
                                            for name, tensor in theirs.items()}, {"format": "pt"})
    return folder


def read(folder: Path, model: ModelConfig) -> tuple[Checkpoint, LoraConfig]:
    """The adapters in a folder of peft, for a model of this configuration, and their settings.

    The checkpoint contains only the adapters, under our names. Raises CheckpointError if the folder holds something
    else or adapters of another model.
    """
    said = read_object(folder / CONFIG)
    lora = _settings(said, folder)
    is_joined = _check_patterns(said, lora, family_of(vars(model)) == OWN, folder)
    theirs = {name.removeprefix(_PREFIX): tensor for name, tensor in stored_in(folder / WEIGHTS).items()}
    tensors: dict[str, Tensor] = {}
    for name, modules, adapters in _layers(model, replace(lora, lora_targets=possible_targets(model))):
        found: list[Pair | None] = []
        for module in modules:
            both = [theirs.pop(f"{module}.lora_{which}.weight", None) for which in "AB"]
            found.append(None if both[0] is None or both[1] is None else (both[0].read(), both[1].read()))
        if len(modules) < len(adapters.uses) and found[0] is not None:
            found = _apart(found[0], adapters.runs, is_joined, folder)
        for part, pair in zip(adapters.uses, found, strict=False):
            if pair is not None:
                tensors |= {f"{name}.adapters.{part}.{which}.weight": tensor
                            for which, tensor in zip("ab", pair, strict=True)}
    if theirs:
        raise CheckpointError(f"{folder}: holds {min(theirs)}, for which no adapter of this model has a place; give "
                              f"adapters of blocks' linear layers alone, trained on such a model")
    found_targets = {name.split(".")[-3] for name in tensors}
    lora = replace(lora, lora_targets=tuple(target for target in LORA_TARGETS if target in found_targets))
    _check(tensors, model, lora, folder)
    return Checkpoint(folder, 0, {name: stored(tensor) for name, tensor in tensors.items()}, None, {}), lora


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


def _apart(pair: Pair, runs: tuple[int, ...], is_joined: bool, folder: Path) -> list[Pair | None]:
    """The adapters of the three parts that compute what one adapter of the joint layer does.

    `is_joined`: whether that adapter has the block structure that `_joined` gives. Raises CheckpointError if it should
    have but its blocks mix the parts.
    """
    whole_a, whole_b = pair
    all_b = [part.flatten(-2).t() for part in whole_b.t().unflatten(-1, (-1, sum(runs))).split(runs, -1)]
    if not is_joined:
        return [(whole_a, b) for b in all_b]
    parts: list[Pair | None] = []
    for place, (a, b) in enumerate(zip(whole_a.chunk(len(runs)), all_b, strict=True)):
        blocks = b.chunk(len(runs), 1)
        if any(block.any() for at, block in enumerate(blocks) if at != place):
            raise CheckpointError(f"{folder}: its adapters of {_FUSED} mix queries, keys and values, for which there "
                                  "is no place here; merge them into the model with peft, and convert that")
        parts.append((a, blocks[place]) if a.any() else None)
    return parts


def _patterns(lora: LoraConfig) -> dict[str, dict[str, float]]:
    """The entries of adapter_config.json for joint adapters of queries, keys and values: rank 3 r, the same scale."""
    assert lora.lora_rank is not None
    alpha = lora.lora_alpha * (math.sqrt(3) if lora.lora_rslora else 3)
    return {"rank_pattern": {_FUSED: 3 * lora.lora_rank}, "alpha_pattern": {_FUSED: alpha}}


def _check_patterns(said: Mapping[str, Any], lora: LoraConfig, is_own: bool, folder: Path) -> bool:
    """Whether joint adapters have the form of `_joined`; raises CheckpointError for any other rank or alpha pattern."""
    patterns = {name: said.get(name) for name in ("rank_pattern", "alpha_pattern")}
    if not any(patterns.values()):
        return False
    if not is_own or patterns != _patterns(lora):
        raise CheckpointError(f"{folder}: its layers have ranks or scales of their own (rank_pattern, alpha_pattern), "
                              "here all have the same; merge them into the model with peft, and convert that")
    return True


def _settings(said: Mapping[str, Any], folder: Path) -> LoraConfig:
    """The settings in adapter_config.json, except the targets; raises CheckpointError for anything but plain LoRA."""
    others = {name: value for name, value in said.items() if name not in _KNOWN | _FREE and value not in (
        None, False, "none", [], {})}
    if said.get("peft_type") != "LORA":
        others["peft_type"] = said.get("peft_type")
    if said.get("init_lora_weights", True) not in _INITIAL:
        others["init_lora_weights"] = said["init_lora_weights"]
    for name, value in sorted(others.items()):
        raise CheckpointError(f"{folder}: was made with {name} {str(value)[:60]}, and adapters here are plain LoRA; "
                              "merge them into the model with peft, and convert that")
    numbers: list[Any] = [said.get("r"), said.get("lora_alpha"), said.get("lora_dropout", 0.0)]
    rank, alpha, dropout = (value if type(value) in (int, float) else -1 for value in numbers)
    if type(rank) is not int or not (0 < rank < 2**20 and 0 < alpha < math.inf and 0 <= dropout < 1):
        raise CheckpointError(f"{folder / CONFIG} has r, lora_alpha and lora_dropout {str(numbers)[:80]}, which are "
                              "not those of adapters; copy it again")
    return LoraConfig(rank, alpha, dropout, lora_rslora=bool(said.get("use_rslora")))


def _check(tensors: Mapping[str, Tensor], model: ModelConfig, lora: LoraConfig, folder: Path) -> None:
    """Raises CheckpointError if the tensors are not those that such adapters have in such a model."""
    if not tensors:
        raise CheckpointError(f"{folder / WEIGHTS} holds no adapter; copy it again")
    expected = {f"{name}.adapters.{part}.{which}.weight": tuple(getattr(adapter, which).weight.shape)
                for name, _, adapters in _layers(model, lora)
                for part, adapter in zip(adapters.uses, adapters.of_parts(), strict=True) if adapter is not None
                for which in "ab"}
    for name in sorted(expected):
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != expected[name]:
            raise CheckpointError(f"{folder}: {name} is {'not there' if found is None else list(found)}, where the "
                                  f"model and its other adapters say {list(expected[name])}; give adapters that were "
                                  "trained on this model, with the same targets in all blocks")
