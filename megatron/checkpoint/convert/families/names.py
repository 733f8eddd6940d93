"""Parameter names of other programs, a table for each, and the conversion of tensors to and from our layout.

A table maps our name of a module (N: the layer's number) to theirs; `.weight` and `.bias` follow on both sides. Three
names for one are queries, keys and values, which are one matrix here, with rows in the order [n, 3, d] for n heads of
width d.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.contents import Box, Checkpoint, Piece, StoredTensor, Tensors, one_piece
from megatron.config import ModelConfig, PrecisionConfig
from megatron.errors import CheckpointError
from megatron.model.protein_model import ProteinModel

POSITIONS = "embedding.position_embeddings.weight"
_LAYER = re.compile(r"\.layers\.([0-9]{1,5})\.")
Table = Mapping[str, str | Sequence[str]]

OURS: Table = {}

HF_ESM: Table = {
    "embedding.word_embeddings": "esm.embeddings.word_embeddings",
    "embedding.position_embeddings": "esm.embeddings.position_embeddings",
    "embedding.layernorm": "esm.embeddings.layer_norm",
    "transformer.layers.N.input_layernorm": "esm.encoder.layer.N.attention.LayerNorm",
    "transformer.layers.N.attention.query_key_value": tuple(
        f"esm.encoder.layer.N.attention.self.{part}" for part in ("query", "key", "value")),
    "transformer.layers.N.attention.dense": "esm.encoder.layer.N.attention.output.dense",
    "transformer.layers.N.post_attention_layernorm": "esm.encoder.layer.N.LayerNorm",
    "transformer.layers.N.mlp.dense_h_to_4h": "esm.encoder.layer.N.intermediate.dense",
    "transformer.layers.N.mlp.dense_4h_to_h": "esm.encoder.layer.N.output.dense",
    "transformer.final_layernorm": "esm.encoder.emb_layer_norm_after",
    "lm_head.dense": "lm_head.dense",
    "lm_head.layernorm": "lm_head.layer_norm",
    "lm_head.decoder.weight": "lm_head.decoder.weight",
    "lm_head.bias": "lm_head.bias",
    "contact_head": "esm.contact_head.regression",
}
HF_BERT: Table = {
    "embedding.word_embeddings": "bert.embeddings.word_embeddings",
    "embedding.position_embeddings": "bert.embeddings.position_embeddings",
    "embedding.layernorm": "bert.embeddings.LayerNorm",
    "transformer.layers.N.attention.query_key_value": tuple(
        f"bert.encoder.layer.N.attention.self.{part}" for part in ("query", "key", "value")),
    "transformer.layers.N.attention.dense": "bert.encoder.layer.N.attention.output.dense",
    "transformer.layers.N.attention_output_layernorm": "bert.encoder.layer.N.attention.output.LayerNorm",
    "transformer.layers.N.mlp.dense_h_to_4h": "bert.encoder.layer.N.intermediate.dense",
    "transformer.layers.N.mlp.dense_4h_to_h": "bert.encoder.layer.N.output.dense",
    "transformer.layers.N.mlp_output_layernorm": "bert.encoder.layer.N.output.LayerNorm",
    "lm_head.dense": "cls.predictions.transform.dense",
    "lm_head.layernorm": "cls.predictions.transform.LayerNorm",
    "lm_head.decoder.weight": "cls.predictions.decoder.weight",
    "lm_head.bias": "cls.predictions.bias",
}
FAIR_ESM: Table = {
    "embedding.word_embeddings": "embed_tokens",
    "embedding.position_embeddings": "embed_positions",
    "embedding.layernorm": "emb_layer_norm_before",
    "transformer.layers.N.input_layernorm": "layers.N.self_attn_layer_norm",
    "transformer.layers.N.attention.query_key_value": tuple(f"layers.N.self_attn.{part}_proj" for part in "qkv"),
    "transformer.layers.N.attention.dense": "layers.N.self_attn.out_proj",
    "transformer.layers.N.post_attention_layernorm": "layers.N.final_layer_norm",
    "transformer.layers.N.mlp.dense_h_to_4h": "layers.N.fc1",
    "transformer.layers.N.mlp.dense_4h_to_h": "layers.N.fc2",
    "transformer.final_layernorm": "emb_layer_norm_after",
    "lm_head.dense": "lm_head.dense",
    "lm_head.layernorm": "lm_head.layer_norm",
    "lm_head.decoder.weight": "lm_head.weight",
    "lm_head.bias": "lm_head.bias",
    "contact_head": "contact_head.regression",
}


def their_names(ours: str, table: Table) -> list[str]:
    """The other program's name of one of our parameters, or its three names for queries, keys and values.

    Our own name if it is not in the table.
    """
    match = _LAYER.search(ours)
    general = _LAYER.sub(".layers.N.", ours)
    module, _, kind = general.rpartition(".")
    theirs, ending = (table[module], f".{kind}") if module in table else (table.get(general, ours), "")
    names = [theirs] if isinstance(theirs, str) else theirs
    return [name.replace(".N.", f".{match[1]}.") + ending if match else name + ending for name in names]


def shapes_of(config: Mapping[str, Any], num_rows: int) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters, by our names, of a model of these flags with `num_rows` vocabulary rows."""
    flags = {item.name: config[item.name] for item in fields(ModelConfig) if item.name in config}
    flags["make_vocab_size_divisible_by"] = 1
    with torch.device("meta"):
        model = ProteinModel(ModelConfig(**flags), PrecisionConfig(), num_rows, mask_id=0)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def our_tensors(theirs: Tensors, shapes: Mapping[str, tuple[int, ...]], table: Table, heads: int,
                place: Path) -> dict[str, StoredTensor]:
    """The parameters named in `shapes`, under our names; raises CheckpointError if one is missing or has another shape.
    """
    model = {}
    for ours, shape in shapes.items():
        names = their_names(ours, table)
        for name in names:
            expected = [shape[0] // len(names), *shape[1:]]
            if name not in theirs:
                raise CheckpointError(f"{place}: has no {name}, which its configuration asks for; copy all of it again")
            if list(theirs[name].shape) != expected or not theirs[name].dtype.is_floating_point:
                found = f"{list(theirs[name].shape)} of {str(theirs[name].dtype).removeprefix('torch.')}"
                raise CheckpointError(f"{place}: {name} is {found}, where its configuration says {expected}; copy all "
                                      "of it again, from one place")
        parts = [theirs[name] for name in names]
        model[ours] = parts[0] if len(parts) == 1 else fused(parts, heads)
    return model


def family_tensors(checkpoint: Checkpoint, config: Mapping[str, Any], table: Table, num_tokens: int,
                   first_row: int) -> dict[str, StoredTensor]:
    """A checkpoint's parameters under the names of `table`, with `first_row` rows of zeros before the positions.

    Raises CheckpointError if the checkpoint's parameters are not those of a model of these flags.
    """
    theirs: dict[str, StoredTensor] = {}
    shapes, model = shapes_of(config, num_tokens), checkpoint.model
    wrong = sorted(name for name in shapes.keys() | model.keys()
                   if name not in shapes or name not in model or model[name].shape != shapes[name])
    if wrong:
        raise CheckpointError(f"{checkpoint.path}: parameter {wrong[0]} is not what its flags say; convert a whole "
                              "checkpoint with its own flags")
    for ours in shapes:
        names, tensor = their_names(ours, table), model[ours]
        if ours == POSITIONS and first_row:
            tensor = _behind_zeros(tensor, first_row)
        parts = [tensor] if len(names) == 1 else split(tensor, config["num_attention_heads"])
        theirs |= zip(names, parts, strict=True)
    return theirs


def _behind_zeros(tensor: StoredTensor, count: int) -> StoredTensor:
    """A table with `count` rows of zeros before its own."""
    rows, columns = tensor.shape

    def zeros(box: Box) -> Tensor:
        return torch.zeros([part.stop - part.start for part in box], dtype=tensor.dtype)

    behind = [Piece((count + piece.offsets[0], piece.offsets[1]), piece.shape, piece.read) for piece in tensor.pieces]
    return StoredTensor((count + rows, columns), tensor.dtype, (Piece((0, 0), (count, columns), zeros), *behind))


def fused(parts: Sequence[StoredTensor], heads: int) -> StoredTensor:
    """One tensor with rows [n, 3, d], made lazily of queries, keys and values with rows [n, d]; `heads`: n."""
    first, count = parts[0], len(parts)
    width = first.shape[0] // heads

    def read(box: Box) -> Tensor:
        start, stop = box[0].start, box[0].stop
        low, high = start // (count * width), -(-stop // (count * width))
        rows = torch.empty(high - low, count, width, *(part.stop - part.start for part in box[1:]), dtype=first.dtype)
        for at, part in enumerate(parts):
            rows[:, at] = part.read_box((slice(low * width, high * width), *box[1:])).unflatten(0, (-1, width))
        return rows.flatten(0, 2)[start - low * count * width:stop - low * count * width]

    return one_piece((count * first.shape[0], *first.shape[1:]), first.dtype, read)


def split(whole: StoredTensor, heads: int) -> list[StoredTensor]:
    """The queries, keys and values, rows [n, d], of a tensor with rows [n, 3, d]; `heads`: n.

    If they are read in this order, the whole is read only once.
    """
    width = whole.shape[0] // (3 * heads)
    held: list[Tensor] = []

    def part(at: int) -> StoredTensor:
        def read(box: Box) -> Tensor:
            if not held:
                held.append(whole.read())
            rows = held[0].unflatten(0, (heads, 3, width))[:, at].flatten(0, 1)[box].clone()
            if at == 2:
                held.clear()
            return rows

        return one_piece((heads * width, *whole.shape[1:]), whole.dtype, read)

    return [part(at) for at in range(3)]
