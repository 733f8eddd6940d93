"""The parameters of megatron-core's BERT: their names there and here.

In `encoder.layers.N`, N counts from the first layer of the whole model, not of a pipeline stage.
"""

import re
from pathlib import Path

import torch

from megatron.checkpoint.contents import StoredTensor, Tensors
from megatron.checkpoint.convert.megatron_v2.names import num_layers, parameter_names
from megatron.checkpoint.convert.token_types import NOTE, left_out, with_first_type
from megatron.checkpoint.convert.vocabulary import WORDS
from megatron.errors import CheckpointError

OUTPUT = "output_layer.weight"  # if tied: the last pipeline stage's copy of the word embedding
LAYER = re.compile(r"encoder\.layers\.([0-9]{1,5})\.(.+)")
# Transformer Engine has a LayerNorm inside the linear layer that follows it; torch_dist always uses these names.
FUSED = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_",
         "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
_POSITIONS, _TOKEN_TYPES = "embedding.position_embeddings.weight", "embedding.tokentype_embeddings.weight"
# Entries for the FP8 state of a module. They are empty here, but strict loaders require them.
_EXTRA = "._extra_state"
LAYER_EXTRAS = tuple(f"{module}{_EXTRA}" for module in ("self_attention.linear_proj", "self_attention.linear_qkv",
                                                        "mlp.linear_fc1", "mlp.linear_fc2"))
OUTPUT_EXTRA = f"output_layer{_EXTRA}"
# Prefixes of our names, the longest first, and of theirs.
_BEGINNINGS = {"transformer.layers.": "encoder.layers.", "transformer.": "encoder.",
               "lm_head.layernorm.": "lm_head.layer_norm.", "lm_head.bias": "output_layer.bias"}
_IN_LAYERS = {".attention.query_key_value.": ".self_attention.linear_qkv.",
              ".attention.dense.": ".self_attention.linear_proj.", ".post_attention_layernorm.": ".pre_mlp_layernorm.",
              ".mlp.dense_h_to_4h.": ".mlp.linear_fc1.", ".mlp.dense_4h_to_h.": ".mlp.linear_fc2."}


def their_name(ours: str) -> str:
    """megatron-core's name of one of our parameters."""
    for here, there in _BEGINNINGS.items():
        if ours.startswith(here):
            ours = there + ours.removeprefix(here)
            break
    for here, there in _IN_LAYERS.items():
        ours = ours.replace(here, there)
    return ours


def is_extra(name: str) -> bool:
    """Whether an entry is a module's FP8 state, not a parameter."""
    return _EXTRA in name


def our_tensors(theirs: Tensors, place: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """The parameters under our names, and a note on each kind of parameter that our model does not have.

    Raises CheckpointError if they are not those of a BERT that our model can represent.
    """
    left = {_plain(name): tensor for name, tensor in theirs.items()}
    model = {}
    for ours in parameter_names(max(1, num_layers(left))):
        name = their_name(ours)
        if name not in left:
            raise CheckpointError(f"{place}: has no {name}; give a whole checkpoint of megatron-core's BERT")
        model[ours] = left.pop(name)
    _check_shapes(model, place)
    notes = []
    output, words = left.pop(OUTPUT, None), model[WORDS]
    if output is not None and not (output.shape == words.shape and torch.equal(output.read(), words.read())):
        raise CheckpointError(f"{place}: {OUTPUT} is not the word embedding, to which models here are tied; train it "
                              "without --untie-embeddings-and-output-weights")
    if (types := left.pop(_TOKEN_TYPES, None)) is not None:
        model[_POSITIONS] = with_first_type(model[_POSITIONS], types, _TOKEN_TYPES, place)
        notes.append(NOTE)
    beside = [name for name in left if name.startswith(("pooler.", "binary_head."))]
    if beside:
        notes.append(left_out(name.split(".")[0] for name in beside))
    if unknown := sorted(left.keys() - set(beside)):
        raise CheckpointError(f"{place}: holds {unknown[0]}, which masked language models here have no place for; give "
                              "a checkpoint of megatron-core's BERT")
    return model, notes


def _plain(theirs: str) -> str:
    """A name with its LayerNorm as a module of its own."""
    for plain, fused in FUSED.items():
        theirs = theirs.replace(fused, plain)
    return theirs


def _check_shapes(model: Tensors, place: Path) -> None:
    """Raises CheckpointError if the shapes do not fit together."""
    words, width = model[WORDS], model["transformer.layers.0.mlp.dense_h_to_4h.weight"].shape[0]
    rows = model["transformer.layers.0.attention.query_key_value.weight"].shape[0]
    hidden = words.shape[-1]
    inner = model["transformer.layers.0.attention.dense.weight"].shape[-1]
    sizes = {"word_embeddings.weight": (words.shape[0], hidden), "lm_head.bias": (words.shape[0],),
             "position_embeddings.weight": (model[_POSITIONS].shape[0], hidden),
             "lm_head.dense.weight": (hidden, hidden),
             "query_key_value.weight": (rows, hidden), "query_key_value.bias": (rows,),
             "attention.dense.weight": (hidden, inner), "dense_h_to_4h.weight": (width, hidden),
             "dense_h_to_4h.bias": (width,), "dense_4h_to_h.weight": (hidden, width)}
    for ours, tensor in model.items():
        expected = next((shape for ending, shape in sizes.items() if ours.endswith(ending)), (hidden,))
        if tuple(tensor.shape) != expected:
            raise CheckpointError(f"{place}: {their_name(ours)} is {list(tensor.shape)}, expected {list(expected)} "
                                  "beside the others; gated or grouped layers have no place here, else copy it again")
    if rows != 3 * inner:
        raise CheckpointError(f"{place}: has {rows} rows of queries, keys and values, expected 3 x {inner}; models "
                              "here have as many keys as queries, train it without --group-query-attention")
