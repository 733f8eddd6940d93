"""From the tensors of a family's program to parameters of ours, whatever files they come from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.convert.families.names import POSITIONS, Table, our_tensors, shapes_of, their_names
from megatron.checkpoint.convert.token_types import NOTE, with_first_type
from megatron.checkpoint.convert.vocabulary import BIAS, OUTPUT, WORDS, rows_for, with_rows
from megatron.checkpoint.stored import Checkpoint, StoredTensor, Tensors
from megatron.errors import CheckpointError
from megatron.kernels.rotary import PRECISIONS, frequencies_of

FREQUENCIES = ".inv_freq"
TYPES = "bert.embeddings.token_type_embeddings.weight"
# What is no part of the masked language model, or of those of its kind.
_BESIDE = ("bert.pooler.", "cls.seq_relationship.", "esm.pooler.", "esm.embeddings.position_embeddings.")


@dataclass(frozen=True)
class ModelFamily:
    """A model of a program: our flags for it, the table of its names, its tokens and the row of the first position."""

    config: dict[str, Any]
    table: Table
    num_tokens: int
    first_row: int


def checkpoint_of(family: ModelFamily, tensors: Tensors, place: Path, state: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint of no iteration that a program's tensors are, with `state` beside what they tell themselves.

    Raises CheckpointError where they are not all that such a model has, or more.
    """
    left, config, notes = dict(tensors), family.config, list(state.get("notes", ()))
    if "contact_head" in family.table:
        config = config | {"contact_head": their_names("contact_head.weight", family.table)[0] in left}
    frequencies = [left.pop(name) for name in list(left) if name.endswith(FREQUENCIES)]
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


def _precision(frequencies: list[StoredTensor], config: Mapping[str, Any], place: Path) -> str:
    """What the frequencies of rotary positions were rounded to; raises CheckpointError where they are others."""
    for name in PRECISIONS:
        expected = frequencies_of(config["kv_channels"], config["rotary_base"], name)
        if all(found.shape == tuple(expected.shape) and torch.allclose(found.read().float(), expected, rtol=1e-6)
               for found in frequencies):
            return name
    raise CheckpointError(f"{place}: its inv_freq are not those of rotary positions with base {config['rotary_base']:g}"
                          f" over {config['kv_channels']} columns; give a model whose positions are not scaled")


def _drop_copies(left: dict[str, StoredTensor], family: ModelFamily, place: Path) -> None:
    """Take out the copies of what is tied; raises CheckpointError where they are none.

    Where the head's matrix is its own, so is the bias that stands with it, and the other takes no part.
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
    """Let the table of positions begin with that of a protein's first token."""
    if name in left and len(left[name].shape) == 2 and left[name].shape[0] > first:
        rows, columns = left[name].shape
        left[name] = left[name].part((slice(first, rows), slice(0, columns)))


def _beside(names: set[str], place: Path) -> list[str]:
    """A note on what else there is; raises CheckpointError where it is not known."""
    rest = sorted(name for name in names if not name.endswith(".position_ids"))
    if unknown := [name for name in rest if not name.startswith(_BESIDE)]:
        raise CheckpointError(f"{place}: holds {unknown[0]}, which models here have no place for; give a masked "
                              "language model of ESM-2, ESM-1b or ProtBERT as it was published")
    dropped = sorted({name.rpartition(".")[0] for name in rest})
    return [f"left out: {', '.join(dropped)}, which take no part in the masked language model"] if dropped else []
