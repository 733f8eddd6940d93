"""The tensors in a Megatron v2 file: their names there and here, how they are split over ranks, and their order."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.contents import Box, Piece, StoredTensor
from megatron.errors import CheckpointError

HEAD_COPY = "word_embeddings_for_head.weight"  # the last pipeline stage's copy of the tied embedding
TOKEN_TYPES = "embedding.tokentype_embeddings.weight"
# In the order in which Megatron walks its modules.
_PARTS = ("language_model", "word_embeddings_for_head", "lm_head", "binary_head")
_OURS = re.compile(
    r"embedding\.(word|position)_embeddings\.weight|transformer\.final_layernorm\.(weight|bias)|"
    r"transformer\.layers\.[0-9]{1,5}\.((input|post_attention)_layernorm|attention\.(query_key_value|dense)|"
    r"mlp\.dense_(h_to_4h|4h_to_h))\.(weight|bias)|lm_head\.(bias|(dense|layernorm)\.(weight|bias))")
# Of our names, and of megatron-core's.
_ROWS = re.compile(r".*(word_embeddings\.weight|(lm_head|output_layer)\.bias|output_layer\.weight|"
                   r"(query_key_value|dense_h_to_4h|linear_qkv|linear_fc1)\.(weight|bias))|" + re.escape(HEAD_COPY))
_COLUMNS = re.compile(r".*(attention\.dense|dense_4h_to_h|linear_proj|linear_fc2)\.weight")
_LAYER = re.compile(r"((?:transformer|encoder)\.layers\.)([0-9]{1,5})(?=\.)")


@dataclass(frozen=True)
class NamedParameter:
    """A parameter in a rank's file: our name for it (`name`), the file's (`there`), and its value."""

    name: str
    there: str
    tensor: StoredTensor

    @property
    def is_ours(self) -> bool:
        """Whether our models have this parameter; others are dropped or, like token types, added to another one."""
        return _OURS.fullmatch(self.name) is not None


def split_dim(name: str) -> int | None:
    """The dimension along which a parameter is split over tensor ranks; None if every rank holds all of it."""
    return 0 if _ROWS.fullmatch(name) else 1 if _COLUMNS.fullmatch(name) else None


def decays(name: str) -> bool:
    """Whether Megatron applies weight decay to the parameter; these form the optimizer's first group."""
    return not (name.endswith("bias") or "layernorm." in name)


def chunks_of(tree: Mapping[str, Any], path: Path) -> list[list[NamedParameter]]:
    """The parameters in a rank's file, a list for each virtual stage, in the order of Megatron's modules.

    `tree`: the file's content. Layers are numbered from 0 in each stage. Raises CheckpointError for a parameter that
    our models do not have.
    """
    keys = ["model"] if "model" in tree else [
        key for number in range(len(tree)) if (key := f"model{number}") in tree]
    chunks = []
    for key in keys:
        entries = [NamedParameter(_our_name(there), there, tensor) for there, tensor in _flat(tree[key], path)]
        for entry in entries:
            if entry.there.split(".")[0] not in _PARTS or not (entry.is_ours or _is_known_extra(entry.name)):
                raise CheckpointError(f"{path}: holds {entry.there}, which masked language models here have no place "
                                      "for; give a checkpoint of Megatron's BERT")
        chunks.append(sorted(entries, key=lambda entry: _PARTS.index(entry.there.split(".")[0])))
    if not chunks:
        raise CheckpointError(f"{path}: holds no model, only {', '.join(map(str, list(tree)[:5]))}; give a "
                              "model_optim_rng.pt of Megatron v2")
    return chunks


def parameter_names(num_layers: int) -> list[str]:
    """Our names of all parameters of a model with `num_layers` layers, in the order of its modules."""
    both = ("weight", "bias")
    blocks = ("input_layernorm", "attention.query_key_value", "attention.dense", "post_attention_layernorm",
              "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    layers = [f"layers.{layer}.{block}" for layer in range(num_layers) for block in blocks]
    return ["embedding.word_embeddings.weight", "embedding.position_embeddings.weight",
            *(f"transformer.{part}.{kind}" for part in [*layers, "final_layernorm"] for kind in both),
            "lm_head.bias", *(f"lm_head.{part}.{kind}" for part in ("dense", "layernorm") for kind in both)]


def renumbered(name: str, added: int) -> str:
    """The parameter's name with `added` added to its layer's number; unchanged if it is in no layer."""
    return _LAYER.sub(lambda match: f"{match[1]}{int(match[2]) + added}", name)


def num_layers(names: Iterable[str]) -> int:
    """The number of layers, by the highest layer number in the parameters' names."""
    return 1 + max((int(match[2]) for name in names if (match := _LAYER.match(name))), default=-1)


def stage_of(name: str, depth: int, num_stages: int) -> int:
    """The pipeline stage that has a parameter, of `num_stages` with as many of the `depth` layers each."""
    if match := _LAYER.match(name):
        return int(match[2]) // (depth // num_stages)
    return 0 if name.startswith("embedding.") else num_stages - 1


def by_head(tensor: StoredTensor, heads: int, version: float) -> StoredTensor:
    """Queries, keys and values with their rows in the order [heads, 3, width], as since checkpoint version 2.

    `tensor`: with the rows of an older version: [3, heads, width] in version 0, [heads, width, 3] in version 1.
    """
    rows = tensor.shape[0] // heads  # of one head: 3 x width
    width = rows // 3

    def read(head: int, box: Box) -> Tensor:
        if version >= 1:
            values = tensor.read_box(_rows(head * rows, rows, tensor))
            return values.view(width, 3, *values.shape[1:]).transpose(0, 1).flatten(0, 1)[box].contiguous()
        parts = [tensor.read_box(_rows((part * heads + head) * width, width, tensor)) for part in range(3)]
        return torch.cat(parts)[box].contiguous()

    others = tensor.shape[1:]
    return StoredTensor(tensor.shape, tensor.dtype, tuple(
        Piece((head * rows, *(0 for _ in others)), (rows, *others), partial(read, head)) for head in range(heads)))


def _rows(start: int, size: int, tensor: StoredTensor) -> Box:
    return (slice(start, start + size), *(slice(0, other) for other in tensor.shape[1:]))


def _flat(tree: Any, path: Path, prefix: str = "") -> Iterator[tuple[str, StoredTensor]]:
    """The tensors in nested tables, with their keys joined by dots; raises CheckpointError for anything else."""
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: {prefix or 'its model'} is a {type(tree).__name__}, not a table of parameters; "
                              "give a model_optim_rng.pt of Megatron v2")
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, StoredTensor):
            yield name, value
        else:
            yield from _flat(value, path, name)


def _our_name(there: str) -> str:
    """Our name of a parameter of any generation of Megatron, whose names differ a little."""
    name = there.removeprefix("language_model.")
    name = re.sub(r"^encoder\.", "transformer.", name)
    name = name.replace(".self_attention.", ".attention.")
    return re.sub(r"(?<=[._])norm(?=\.)", "layernorm", name)


def _is_known_extra(name: str) -> bool:
    """Whether a parameter is one that Megatron's BERT has in addition to ours."""
    return name in (HEAD_COPY, TOKEN_TYPES) or name.startswith(("pooler.", "binary_head."))
