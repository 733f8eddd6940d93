"""Writes a checkpoint as the files per rank that Megatron v2 loads, with one tensor in memory at a time."""

import argparse
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.contents import Checkpoint, StoredTensor, split
from megatron.checkpoint.convert.megatron_v2.arguments import arguments_of, learning_rate, refuse_others, scheduler_of
from megatron.checkpoint.convert.megatron_v2.names import (
    decays,
    num_layers,
    parameter_names,
    renumbered,
    split_dim,
    stage_of,
)
from megatron.checkpoint.convert.megatron_v2.randomness import random_states
from megatron.checkpoint.convert.megatron_v2.rank_files import check_divisions, write_rank_files
from megatron.checkpoint.convert.vocabulary import BIAS, WORDS, rows_for, with_rows
from megatron.errors import CheckpointError

_VERSION = 3.0
_HALVES = (torch.float16, torch.bfloat16)


def write(checkpoint: Checkpoint, folder: Path, *, tensor: int = 1, pipeline: int = 1) -> Path:
    """Write a checkpoint for `tensor` x `pipeline` ranks and the pointer into a run's folder; returns its path.

    The vocabulary is padded as Megatron does for so many tensor ranks; padding is never predicted. Raises ConfigError
    if the model cannot be divided so, CheckpointError if Megatron has no such model or the disk refuses.
    """
    files = _Files(checkpoint, tensor, pipeline)
    return write_rank_files(folder, checkpoint.iteration, tensor, pipeline, files.tree)


class _Files:
    """Builds the content of each rank's file."""

    def __init__(self, checkpoint: Checkpoint, num_tensor: int, num_pipeline: int) -> None:
        self._checkpoint, self._num_tensor, self._num_pipeline = checkpoint, num_tensor, num_pipeline
        self._config = checkpoint.state.get("config", {})
        self._num_layers = num_layers(checkpoint.model)
        refuse_others(checkpoint)
        names = parameter_names(self._num_layers)
        if wrong := sorted(set(names) ^ checkpoint.model.keys()):
            raise CheckpointError(f"{checkpoint.path}: parameter {wrong[0]} is not one that Megatron v2 has, or is "
                                  "missing; only models of ProteinLM's kind can be written as its checkpoints")
        self._check_divisions()
        padded = with_rows(checkpoint, rows_for(checkpoint.model[WORDS].shape[0], num_tensor, checkpoint))
        self._masters = padded.model
        self._moments = {key: moment for key, moment in (padded.optimizer or {}).items() if moment.shape}
        self._kinds = list(dict.fromkeys(key.partition("/")[0] for key in self._moments))
        # The half precision of the model's copy of the weights, if Megatron keeps fp32 masters in the optimizer.
        half = torch.float16 if self._config.get("fp16") else torch.bfloat16 if self._config.get("bf16") else None
        self._half = half if self._moments else None
        held = checkpoint.model[WORDS].dtype
        self._dtype = self._half or (held if held in _HALVES and not self._moments else torch.float32)  # of the model
        self._arguments = arguments_of(padded, num_tensor, num_pipeline, self._dtype)

    def tree(self, rank: int, stage: int) -> dict[str, Any]:
        """The content of the file of tensor rank `rank` and pipeline stage `stage`."""
        checkpoint = self._checkpoint
        names = self._names(stage)
        tree: dict[str, Any] = {
            "args": argparse.Namespace(**self._arguments, rank=stage * self._num_tensor + rank),
            "checkpoint_version": _VERSION, "iteration": checkpoint.iteration,
            "model": self._model(names, rank, stage)}
        if self._moments:
            tree["optimizer"] = self._optimizer(names, rank)
        scheduler = scheduler_of(checkpoint.state)
        if scheduler is not None:
            tree["lr_scheduler"] = scheduler
        return tree | random_states(tree["args"].seed, rank, stage)

    def _names(self, stage: int) -> list[str]:
        """A stage's parameters, in the order of Megatron's modules; the last stage has a copy of the tied embedding."""
        names = [name for name in parameter_names(self._num_layers)
                 if stage_of(name, self._num_layers, self._num_pipeline) == stage]
        if 0 < stage == self._num_pipeline - 1:
            names.insert(names.index(BIAS), WORDS)  # before the head
        return names

    def _model(self, names: Sequence[str], rank: int, stage: int) -> dict[str, Any]:
        """The entry `model` of a file, with layers numbered from the stage's first."""
        tensors = {name: self._cut(name, self._masters[name].to(self._dtype), rank) for name in names}
        first_layer = stage * (self._num_layers // self._num_pipeline)
        language_model: dict[str, Any] = {}
        if stage == 0:
            language_model["embedding"] = {
                kind: OrderedDict(weight=tensors[f"embedding.{kind}.weight"])
                for kind in ("word_embeddings", "position_embeddings")}
        language_model["transformer"] = OrderedDict(
            (renumbered(name, -first_layer).removeprefix("transformer."), tensor)
            for name, tensor in tensors.items() if name.startswith("transformer."))
        model: dict[str, Any] = {"language_model": language_model}
        if stage == self._num_pipeline - 1:
            model["lm_head"] = OrderedDict((name.removeprefix("lm_head."), tensor) for name, tensor in tensors.items()
                                           if name.startswith("lm_head."))
            if stage:
                model["word_embeddings_for_head"] = OrderedDict(weight=tensors[WORDS])
        return model

    def _optimizer(self, names: Sequence[str], rank: int) -> dict[str, Any]:
        """The entry `optimizer` of a file; parameters have numbers in the order of their two groups."""
        groups = [[name for name in names if decays(name) == is_first] for is_first in (True, False)]
        numbers = {name: number for number, name in enumerate(name for group in groups for name in group)}
        inner = {"state": {number: {kind: self._cut(name, self._moment(kind, name), rank) for kind in self._kinds}
                           for name, number in numbers.items()},
                 "param_groups": [self._facts(bool(at), [numbers[name] for name in group])
                                  for at, group in enumerate(groups)]}
        if self._half is None:
            return inner
        scale, hysteresis, good_steps = self._checkpoint.state["loss_scale"]
        scaler = {"grad_scaler": {"scale": torch.tensor([scale]), "growth_tracker": int(good_steps),
                                  "hysteresis_tracker": int(hysteresis)}}
        masters = [[self._cut(name, self._masters[name], rank) for name in group] for group in groups]
        return {"optimizer": inner, **(scaler if self._half == torch.float16 else {}),
                "fp32_from_fp16_params": masters}

    def _facts(self, is_free: bool, numbers: list[int]) -> dict[str, Any]:
        """A parameter group of the optimizer; `is_free`: without weight decay."""
        config = self._config
        decay = 0.0 if is_free else config.get("weight_decay", 0.01)
        rate = learning_rate(self._checkpoint.state)
        if self._kinds == ["momentum_buffer"]:
            return {"lr": rate, "momentum": config.get("sgd_momentum", 0.9), "dampening": 0, "weight_decay": decay,
                    "nesterov": False, "params": numbers}
        betas = (config.get("adam_beta1", 0.9), config.get("adam_beta2", 0.999))
        steps = [value.read() for key, value in (self._checkpoint.optimizer or {}).items() if key.startswith("step/")]
        step = int(max(steps)) if steps else self._checkpoint.iteration
        return {"lr": rate, "bias_correction": True, "betas": betas, "eps": config.get("adam_eps", 1e-8),
                "weight_decay": decay, "step": step, "params": numbers}

    def _moment(self, kind: str, name: str) -> StoredTensor:
        """A parameter's optimizer state of a kind; raises CheckpointError if it is missing."""
        try:
            return self._moments[f"{kind}/{name}"]
        except KeyError:
            raise CheckpointError(f"{self._checkpoint.path}: the optimizer's state lacks {kind}/{name}; save it with "
                                  "all parameters trained, or with --no-save-optim") from None

    def _cut(self, name: str, whole: StoredTensor, rank: int) -> StoredTensor:
        """A tensor rank's part of `whole`, which is split like parameter `name`."""
        return split(whole, split_dim(name), rank, self._num_tensor)

    def _check_divisions(self) -> None:
        """Raises ConfigError if the model cannot be divided among the ranks, CheckpointError if that is unknown."""
        tensor, heads = self._num_tensor, self._config.get("num_attention_heads")
        if tensor > 1 and not isinstance(heads, int):
            raise CheckpointError(f"{self._checkpoint.path}: does not say how many attention heads it has, by which it "
                                  "would be split; write it for one tensor-parallel rank")
        check_divisions(tensor, self._num_pipeline, heads or 1, self._checkpoint.model)
