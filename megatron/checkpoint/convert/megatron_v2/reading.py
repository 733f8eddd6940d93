"""Reads a Megatron v2 checkpoint: joins the ranks' files into whole tensors under our names, lazily."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.contents import Checkpoint, StoredTensor, joined, stored
from megatron.checkpoint.convert.megatron_v2.arguments import arguments_in, config_of, iteration_of, state_of
from megatron.checkpoint.convert.megatron_v2.names import (
    HEAD_COPY,
    TOKEN_TYPES,
    NamedParameter,
    by_head,
    chunks_of,
    num_layers,
    parameter_names,
    renumbered,
    split_dim,
)
from megatron.checkpoint.convert.megatron_v2.optimizer_state import OptimizerState, loss_scale, optimizer_state
from megatron.checkpoint.convert.megatron_v2.places import RELEASE, Place, find_place
from megatron.checkpoint.convert.megatron_v2.rank_files import read_rank_files, refuse_other_replicas
from megatron.checkpoint.convert.token_types import NOTE, left_out, with_first_type
from megatron.checkpoint.failures import readable
from megatron.errors import CheckpointError

_POSITIONS = "embedding.position_embeddings.weight"


@dataclass(frozen=True)
class _Rank:
    """One rank's file: its content, its parameters (layers numbered in the whole model), its optimizer's state."""

    path: Path
    tree: dict[str, Any]
    entries: list[NamedParameter]
    optimizer: OptimizerState | None = None


def read(path: Path, iteration: int | None = None) -> Checkpoint:
    """The checkpoint of `iteration`, or the newest, in a run's folder; or the one in an iter_ folder or a rank's file.

    Its `state` has "config", "progress", "schedule" and "loss_scale" as far as the files tell, "layout" (the parallel
    sizes that it was saved with), and "notes" (a line for whatever was left out or changed). Raises CheckpointError.
    """
    place = find_place(path, iteration)
    with readable(place.path, "as Megatron writes it"):
        notes: list[str] = []
        stages = _ranks(place, notes)
        first = stages[0][0].tree
        number = iteration_of(place.path, first.get("iteration", first.get("total_iters")))
        join = _Joiner(place, first, len(stages[0]))
        model = _model(stages, join, notes)
        optimizer = None if place.path.name == RELEASE else _optimizer(stages, join)
        config = config_of(arguments_in(first), {name: tensor.shape for name, tensor in model.items()}, place.path)
        known = stages[0][0].optimizer
        state = state_of(first, number, config, (len(stages[0]), len(stages)), notes,
                         known.loss_scale if known is not None else None)
        return Checkpoint(place.path, number, model, optimizer, state)


def _ranks(place: Place, notes: list[str]) -> list[list[_Rank]]:
    """The files of all ranks, as [pipeline rank][tensor rank]; appends to `notes` why there is no optimizer's state."""
    trees = read_rank_files(place, "Megatron v2")
    chunks = [[chunks_of(tree, path) for tree, path in zip(*both, strict=True)]
              for both in zip(trees, place.files, strict=True)]
    if len({len(of_rank) for ranks in chunks for of_rank in ranks}) > 1:
        raise CheckpointError(f"{place.path}: its ranks have not the same number of virtual stages; copy it again")
    entries: list[list[list[NamedParameter]]] = [[[] for _ in ranks] for ranks in chunks]
    # The model's layers go through the first virtual stage of every pipeline rank, then the second of every, ...
    layer = 0
    for chunk, (pipeline, ranks) in itertools.product(range(len(chunks[0][0])), enumerate(chunks)):
        for found, of_rank in zip(entries[pipeline], ranks, strict=True):
            found += [replace(entry, name=renumbered(entry.name, layer)) for entry in of_rank[chunk]]
        layer += num_layers(entry.name for entry in ranks[0][chunk])
    all_ranks = [list(map(_Rank, *stage)) for stage in zip(place.files, trees, entries, strict=True)]
    try:
        return [[replace(rank, optimizer=optimizer_state(rank.tree["optimizer"], rank.entries, rank.path))
                 if rank.tree.get("optimizer") else rank for rank in stage] for stage in all_ranks]
    except CheckpointError as error:  # for many uses the weights are all that is wanted; resuming says what it lacks
        notes.append(f"the optimizer's state is not taken over: {error}")
        return [[replace(rank, optimizer=OptimizerState(loss_scale=loss_scale(rank.tree.get("optimizer"), rank.path)))
                 for rank in stage] for stage in all_ranks]


class _Joiner:
    """Joins the tensor ranks' parts of a parameter into the whole, with rows in our order."""

    def __init__(self, place: Place, tree: dict[str, Any], num_tensor: int) -> None:
        self._place, self._num_tensor, self._heads = place, num_tensor, arguments_in(tree).get("num_attention_heads")
        version = tree.get("checkpoint_version", 0)
        if not isinstance(version, int | float) or not 0 <= version < 4:
            raise CheckpointError(f"{place.path}: checkpoint version {version!r}; versions 0 to 3 are known")
        self._version = version

    def __call__(self, name: str, parts: Sequence[StoredTensor]) -> StoredTensor:
        """The whole of `parts`, one for each tensor rank: parameter `name`, or optimizer state that is split like it.

        Raises CheckpointError if they do not fit together.
        """
        first = parts[0]
        if any((part.shape, part.dtype) != (first.shape, first.dtype) for part in parts):
            raise CheckpointError(f"{self._place.path}: {name} has not the same shape on all tensor ranks; copy it "
                                  "again, all from one run")
        dim = split_dim(name)
        if "query_key_value" in name and self._version < 2:
            parts = [by_head(part, self._heads_of(name, part), self._version) for part in parts]
        if dim is not None and dim >= len(first.shape) and len(parts) > 1:
            raise CheckpointError(f"{self._place.path}: {name} is {list(first.shape)}, not what a rank holds of it")
        return joined(parts, dim)

    def _heads_of(self, name: str, part: StoredTensor) -> int:
        """The number of attention heads on each tensor rank; raises CheckpointError if it is unknown or impossible."""
        if not isinstance(self._heads, int) or self._heads < 1:
            raise CheckpointError(f"{self._place.path}: is of checkpoint version {self._version} and does not say how "
                                  "many attention heads it has, by which its queries, keys and values are ordered; put "
                                  '"args": {"num_attention_heads": …} into its files with torch.load and torch.save')
        heads, rest = divmod(self._heads, self._num_tensor)
        if rest or part.shape[0] % (3 * heads):
            raise CheckpointError(f"{self._place.path}: {name} is {list(part.shape)} on each of {self._num_tensor} "
                                  f"ranks, which is not of {self._heads} heads; copy it again")
        return heads


def _model(stages: Sequence[Sequence[_Rank]], join: _Joiner, notes: list[str]) -> dict[str, StoredTensor]:
    """The parameters by our names, in fp32 where the optimizer has masters; appends to `notes` what was left out."""
    found: dict[str, StoredTensor] = {}
    for ranks in stages:
        if any([entry.name for entry in rank.entries] != [entry.name for entry in ranks[0].entries] for rank in ranks):
            raise CheckpointError(f"{ranks[0].path}: the other tensor ranks of this stage have other parameters; copy "
                                  "the checkpoint again, all from one run")
        for entries in zip(*(rank.entries for rank in ranks), strict=True):
            name = entries[0].name
            if name in found:
                raise CheckpointError(f"{ranks[0].path}: {entries[0].there} is there twice; copy the checkpoint again, "
                                      "all from one run")
            masters = [rank.optimizer.masters.get(name) if rank.optimizer else None for rank in ranks]
            found[name] = join(name, [entry.tensor if master is None else master
                                      for entry, master in zip(entries, masters, strict=True)])
            refuse_other_replicas(name, [entry.tensor for entry in entries], [rank.path for rank in ranks])
    expected = parameter_names(max(1, num_layers(found)))
    model = {name: found[name] for name in expected if name in found}
    extra = {name: tensor for name, tensor in found.items() if name not in model and name != HEAD_COPY}
    if missing := [name for name in expected if name not in model]:
        raise CheckpointError(f"{stages[0][0].path}: parameter {missing[0]} is in none of the ranks' files; copy the "
                              "checkpoint again")
    if TOKEN_TYPES in extra:
        model[_POSITIONS] = with_first_type(model[_POSITIONS], extra.pop(TOKEN_TYPES), TOKEN_TYPES,
                                            stages[0][0].path)
        notes.append(NOTE)
    if extra:
        notes.append(left_out(name.split(".")[0] for name in extra))
    return model


def _optimizer(stages: Sequence[Sequence[_Rank]], join: _Joiner) -> dict[str, StoredTensor] | None:
    """The optimizer's state by KIND/PARAMETER; None if there is none, or no step was taken yet."""
    tensors: dict[str, StoredTensor] = {}
    for ranks in stages:
        states = [rank.optimizer for rank in ranks if rank.optimizer is not None]
        if len(states) != len(ranks):
            return None
        names = {entry.name for entry in ranks[0].entries if entry.is_ours}
        for key in states[0].moments:
            kind, _, name = key.partition("/")
            if name in names:
                parts = [state.moments.get(key) for state in states]
                tensors[key] = join(name, [part for part in parts if part is not None])
        tensors |= {f"step/{name}": stored(torch.tensor(number)) for name, number in states[0].steps.items()
                    if name in names}
    return tensors or None
