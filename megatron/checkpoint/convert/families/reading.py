"""Makes a checkpoint of the tensors of another program's model, whatever files they come from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.contents import Checkpoint, StoredTensor, Tensors, stored
from megatron.checkpoint.convert.families.names import POSITIONS, Table, our_tensors, shapes_of, their_names
from megatron.checkpoint.convert.token_types import NOTE, left_out, with_first_type
from megatron.checkpoint.convert.vocabulary import BIAS, OUTPUT, WORDS, rows_for, with_rows
from megatron.errors import CheckpointError
from megatron.kernels.rotary import PRECISIONS, frequencies_of

_FREQUENCIES = ".inv_freq"
TYPES = "bert.embeddings.token_type_embeddings.weight"
# Prefixes of tensors that the masked language model does not use.
_BESIDE = ("bert.pooler.", "cls.seq_relationship.", "esm.pooler.", "esm.embeddings.position_embeddings.")


@dataclass(frozen=True)
class ModelFamily:
    """What is needed to interpret the tensors of another program's model."""

    config: dict[str, Any]  # our flags for it
    table: Table  # its names
    num_tokens: int
    first_row: int  # the row of the position table that a protein's first token uses


def checkpoint_of(family: ModelFamily, tensors: Tensors, place: Path, state: Mapping[str, Any]) -> Checkpoint:
    """A checkpoint, of iteration 0, made of the tensors of another program's model.

    `state`: further entries for its state, besides "config". Raises CheckpointError if tensors are missing or unknown.
    """
    left, config, notes = dict(tensors), family.config, list(state.get("notes", ()))
    if "contact_head" in family.table:
        config = config | {"contact_head": their_names("contact_head.weight", family.table)[0] in left}
    frequencies = [left.pop(name) for name in list(left) if name.endswith(_FREQUENCIES)]
    if frequencies and config["position_embedding_type"] == "rope":
        config = config | {"rotary_frequency_precision": _precision(frequencies, config, place)}
    _drop_copies(left, family, place)
    shapes = shapes_of(config, family.num_tokens)
    if family.first_row and POSITIONS in shapes:
        _shift(left, their_names(POSITIONS, family.table)[0], family.first_row)
    model = our_tensors(left, shapes, family.table, config["num_attention_heads"], place)
    if (types := left.pop(TYPES, None)) is not None:
        model[POSITIONS] = with_first_type(model[POSITIONS], types, TYPES, place)
        notes.append(NOTE)
    notes += _beside(left.keys() - {name for ours in shapes for name in their_names(ours, family.table)}, place)
    checkpoint = Checkpoint(place, 0, model, None, {**state, "config": config, "notes": notes})
    return with_rows(checkpoint, rows_for(family.num_tokens, 1, checkpoint))


def rotary_frequencies(config: Mapping[str, Any], module: str) -> dict[str, StoredTensor]:
    """The tensors of frequencies that programs store with rotary positions; `module`: of a layer N, in their names."""
    frequencies = stored(frequencies_of(config["kv_channels"], config["rotary_base"],
                                        config["rotary_frequency_precision"]))
    return {module.replace("N", str(number), 1) + _FREQUENCIES: frequencies for number in range(config["num_layers"])}


def _precision(frequencies: list[StoredTensor], config: Mapping[str, Any], place: Path) -> str:
    """The precision that the stored rotary frequencies were rounded to; raises CheckpointError if none fits them."""
    for name in PRECISIONS:
        expected = frequencies_of(config["kv_channels"], config["rotary_base"], name)
        if all(found.shape == tuple(expected.shape) and torch.allclose(found.read().float(), expected, rtol=1e-6)
               for found in frequencies):
            return name
    raise CheckpointError(f"{place}: its inv_freq are not those of rotary positions with base {config['rotary_base']:g}"
                          f" over {config['kv_channels']} columns; give a model whose positions are not scaled")


def _drop_copies(left: dict[str, StoredTensor], family: ModelFamily, place: Path) -> None:
    """Remove the copies of tied parameters from `left`; raises CheckpointError if a copy differs from its original.

    If the output layer is not tied, its own bias is used in place of the head's.
    """
    words, bias, output = (their_names(name, family.table)[0] for name in (WORDS, BIAS, OUTPUT))
    own_bias = output.replace(".weight", ".bias")
    if family.config["untie_embeddings_and_output_weights"]:
        if own_bias in left:
            left[bias] = left.pop(own_bias)
        return
    for copy, original in ((output, words), (own_bias, bias)):
        if copy == original or copy not in left or original not in left:
            continue
        one, other = left.pop(copy), left[original]
        if one.shape != other.shape or not torch.equal(one.read(), other.read()):
            raise CheckpointError(f"{place}: {copy} is not {original}, to which its configuration ties it; say "
                                  "tie_word_embeddings false in it if they are to differ")


def _shift(left: dict[str, StoredTensor], name: str, first: int) -> None:
    """Drop the rows of the position table in `left` before the one of a protein's first token."""
    if name in left and len(left[name].shape) == 2 and left[name].shape[0] > first:
        rows, columns = left[name].shape
        left[name] = left[name].part((slice(first, rows), slice(0, columns)))


def _beside(names: set[str], place: Path) -> list[str]:
    """A note on further tensors that are left out, if any; raises CheckpointError for unknown ones."""
    rest = sorted(name for name in names if not name.endswith(".position_ids"))
    if unknown := [name for name in rest if not name.startswith(_BESIDE)]:
        raise CheckpointError(f"{place}: holds {unknown[0]}, which models here have no place for; give a masked "
                              "language model of ESM-2, ESM-1b or ProtBERT as it was published")
    return [left_out(name.rpartition(".")[0] for name in rest)] if rest else []
