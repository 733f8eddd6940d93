"""Prepares a checkpoint's weights for megatron-core: checks that it has such a model, pads and renames."""

from typing import Any

import torch

from megatron.checkpoint.contents import Checkpoint, StoredTensor
from megatron.checkpoint.convert.megatron_core.arguments import their_arguments
from megatron.checkpoint.convert.megatron_core.names import their_name
from megatron.checkpoint.convert.megatron_v2.arguments import refuse_others
from megatron.checkpoint.convert.megatron_v2.names import num_layers, parameter_names
from megatron.checkpoint.convert.megatron_v2.rank_files import check_divisions
from megatron.checkpoint.convert.vocabulary import WORDS, rows_for, with_rows
from megatron.errors import CheckpointError

_VERSION = 3.0


def weights_of(checkpoint: Checkpoint, tensor: int, pipeline: int) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """The weights to write for `tensor` x `pipeline` ranks, by megatron-core's names, and what goes with them.

    All are in one dtype, and the vocabulary is padded for so many ranks. Raises ConfigError if the model cannot be
    divided so, CheckpointError if megatron-core has no such model.
    """
    model, path = checkpoint.model, checkpoint.path
    refuse_others(checkpoint)
    names = parameter_names(max(1, num_layers(model)))
    if wrong := sorted(set(names) ^ model.keys()):
        raise CheckpointError(f"{path}: parameter {wrong[0]} is not one that megatron-core's BERT has, or is missing; "
                              "only models of ProteinLM's kind can be written as its checkpoints")
    heads = checkpoint.state.get("config", {}).get("num_attention_heads")
    if not isinstance(heads, int):
        raise CheckpointError(f"{path}: does not say how many attention heads it has, which megatron-core needs; save "
                              "it with its configuration")
    check_divisions(tensor, pipeline, heads, model)
    dtype = model[WORDS].dtype if model[WORDS].dtype in (torch.float16, torch.bfloat16) else torch.float32
    padded = with_rows(checkpoint, rows_for(model[WORDS].shape[0], tensor, checkpoint))
    beside = {"args": their_arguments(padded, tensor, pipeline, dtype), "checkpoint_version": _VERSION,
              "iteration": checkpoint.iteration}
    return {their_name(name): padded.model[name].to(dtype) for name in names}, beside
