"""Translates between the arguments that Megatron-LM stores with megatron-core's BERT and our flags."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.contents import Checkpoint, Tensors
from megatron.checkpoint.convert.megatron_core.names import our_tensors
from megatron.checkpoint.convert.megatron_v2 import arguments as v2
from megatron.checkpoint.failures import readable
from megatron.errors import CheckpointError

# Arguments that change what the weights compute, with the value that our models support; more are in megatron_v2.
_SAME = {"quick_geglu": False, "qk_layernorm": False, "multi_latent_attention": False, "window_size": None,
         "mtp_num_layers": None, "hybrid_layer_pattern": None, "qk_l2_norm": False, "softmax_type": "vanilla"}
# Arguments that Megatron-LM requires in a checkpoint, or that mean something else there than in Megatron v2.
_THEIRS = {
    "normalization": "LayerNorm", "position_embedding_type": "learned_absolute", "add_position_embedding": True,
    "use_rotary_position_embeddings": False, "rotary_base": 10000, "rotary_percent": 1.0, "rotary_interleaved": False,
    "add_bias_linear": True, "add_qkv_bias": False, "swiglu": False, "squared_relu": False,
    "apply_layernorm_1p": False, "group_query_attention": False, "num_query_groups": 1, "num_experts": None,
    "untie_embeddings_and_output_weights": False, "apply_query_key_layer_scaling": False, "bert_binary_head": False,
    "no_save_optim": True, "no_save_rng": True}


def checkpoint_of(place: Path, theirs: Tensors, common: Mapping[str, Any], layout: tuple[int, int]) -> Checkpoint:
    """The checkpoint made of weights under megatron-core's names (`theirs`).

    `common`: what the files hold besides tensors, such as the arguments; `layout`: the tensor- and pipeline-parallel
    sizes. Raises CheckpointError.
    """
    with readable(place, "as Megatron-LM writes it"):
        model, notes = our_tensors(theirs, place)
        shapes = {name: tensor.shape for name, tensor in model.items()}
        config = v2.config_of(_as_of_v2(v2.arguments_in(common), place), shapes, place)
        number = v2.iteration_of(place, common.get("iteration", 0))
        notes.append("the optimizer's state is not taken over: it starts afresh")
        state = v2.state_of(common, number, config, layout, notes)
        return Checkpoint(place, number, model, None, state)


def their_arguments(checkpoint: Checkpoint, tensor: int, pipeline: int, dtype: torch.dtype) -> argparse.Namespace:
    """The arguments that Megatron-LM needs to load the weights of `checkpoint`, whose vocabulary is padded already.

    Raises CheckpointError if megatron-core would compute something else with them.
    """
    config = checkpoint.state.get("config", {})
    if config.get("apply_residual_connection_post_layernorm"):
        raise CheckpointError(f"{checkpoint.path}: was trained with --apply-residual-connection-post-layernorm, which "
                              "megatron-core ignores; write it in another format")
    arguments = v2.arguments_of(checkpoint, tensor, pipeline, dtype) | {"rank": 0, **_THEIRS}
    return argparse.Namespace(**arguments | {"norm_epsilon": arguments["layernorm_epsilon"],
                                             "iteration": checkpoint.iteration})


def _as_of_v2(given: Mapping[str, Any], place: Path) -> Mapping[str, Any]:
    """The arguments as Megatron v2 would have them for the same model.

    Raises CheckpointError if they describe a model that ours cannot represent.
    """
    if not given:
        return given
    for name, ours in _SAME.items():
        if (given.get(name, ours) or None) != (ours or None):
            raise CheckpointError(f"{place}: was trained with {name} {given[name]!r}, models here compute as with "
                                  f"{ours!r}; its weights would mean something else")
    # megatron-core ignores both: residuals are from before the LayerNorm, and bias_gelu_fusion selects the GeLU.
    words: dict[str, Any] = {"openai_gelu": False, "apply_residual_connection_post_layernorm": False}
    if "norm_epsilon" in given:
        words["layernorm_epsilon"] = given["norm_epsilon"]
    return {**given, **words}
