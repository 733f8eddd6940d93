"""The form of megatron-core's BERT with a file a rank, of any tensor- and pipeline-parallel size (--ckpt-format torch).

It is written as the model of `--spec local` has it; Megatron-LM takes it with --finetune, or with --no-load-optim and
--no-load-rng.
"""

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.checkpoint.convert.failures import writable
from megatron.checkpoint.convert.megatron_core.arguments import checkpoint_of, their_arguments
from megatron.checkpoint.convert.megatron_core.names import (
    LAYER,
    LAYER_EXTRAS,
    OUTPUT,
    OUTPUT_EXTRA,
    is_extra,
    num_layers,
    split_dim,
)
from megatron.checkpoint.convert.megatron_core.weights import Weights, place_for, point_to, weights_of
from megatron.checkpoint.convert.megatron_v2.places import FILE, RELEASE, find_place, rank_name
from megatron.checkpoint.convert.torch_files import read_torch_file
from megatron.checkpoint.convert.torch_writing import write_torch_file
from megatron.checkpoint.convert.vocabulary import WORDS
from megatron.checkpoint.stored import Checkpoint, Piece, StoredTensor
from megatron.errors import CheckpointError
from megatron.files import new_folder, sync

_HEAD_BYTES = 2**22  # of a file, in which its names are
_VERSION = 3.0


def recognises(path: Path) -> bool:
    """Whether this looks like such a checkpoint, or a folder of them; opens no pickle."""
    try:
        with find_place(path).files[0][0].open("rb") as file:
            return b"self_attention.linear_" in file.read(_HEAD_BYTES)
    except (CheckpointError, OSError):
        return False


def read(path: Path, iteration: int | None = None) -> Checkpoint:
    """The weights of an iteration, or the newest, in a run's folder; or those in an iter_ folder or a file.

    `state` is as that of megatron_v2. Raises CheckpointError.
    """
    place = find_place(path, iteration)
    trees = [[_tree(file) for file in stage] for stage in place.files]
    sizes = (len(trees[0]), len(trees))
    first = trees[0][0]
    for what, found in zip(("tensor", "pipeline"), sizes, strict=True):
        said = getattr(first.get("args"), f"{what}_model_parallel_size", found)
        if said != found:
            raise CheckpointError(f"{place.path}: has files of {found} {what}-parallel ranks, but was written by {said}"
                                  "; copy the others' as well")
    # Virtual stages alternate: the first of each pipeline rank, then the second of each.
    chunks = [key for number in range(len(first)) if (key := f"model{number}") in first] or ["model"]
    theirs: dict[str, StoredTensor] = {}
    depth = 0
    for chunk, stage in itertools.product(chunks, range(sizes[1])):
        merged = _merged([tree.get(chunk) for tree in trees[stage]], place.files[stage])
        theirs |= {_numbered(name, depth): tensor for name, tensor in merged.items()}
        depth += num_layers(merged)
    return checkpoint_of(place.path, 0 if place.path.name == RELEASE else None, theirs, first, sizes)


def write(checkpoint: Checkpoint, folder: Path, *, tensor: int = 1, pipeline: int = 1) -> Path:
    """Write the weights for `tensor` x `pipeline` ranks below a run's folder, and point to them; returns their place.

    The vocabulary gets as many rows more as Megatron has on so many ranks; they take no part in the softmax. Raises
    ConfigError where the model does not divide, CheckpointError where something is missing or the disk refuses.
    """
    weights = weights_of(checkpoint, tensor, pipeline)
    arguments = their_arguments(weights.checkpoint, tensor, pipeline, weights.dtype)
    arguments.spec = ["local"]
    common = {"args": arguments, "checkpoint_version": _VERSION, "iteration": checkpoint.iteration}
    place = place_for(checkpoint, folder)
    with writable(place):
        with new_folder(place) as temporary:
            for stage, rank in itertools.product(range(pipeline), range(tensor)):
                part = temporary / rank_name(rank, stage, pipeline)
                part.mkdir()
                write_torch_file(part / FILE, common | {"model": _model(weights, (rank, tensor), (stage, pipeline))})
                sync(part / FILE)
                sync(part)
        point_to(checkpoint, folder)
    return place


def _tree(path: Path) -> dict[str, Any]:
    tree = read_torch_file(path)
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: holds a {type(tree).__name__}, not a checkpoint; give a {FILE} of Megatron-LM")
    return tree


def _merged(ranks: Sequence[Any], files: Sequence[Path]) -> dict[str, StoredTensor]:
    """The tensors of a stage, of its tensor ranks' tables."""
    for table, file in zip(ranks, files, strict=True):
        if not isinstance(table, dict) or table.keys() != ranks[0].keys():
            raise CheckpointError(f"{file}: its model is no table of the other tensor ranks' parameters; copy the "
                                  "checkpoint again, all from one run")
    merged = {}
    for name in ranks[0]:
        parts = [table[name] for table in ranks]
        if isinstance(name, str) and is_extra(name):
            continue
        first = parts[0]
        if not isinstance(name, str) or not all(
                isinstance(part, StoredTensor) and (part.shape, part.dtype) == (first.shape, first.dtype)
                for part in parts):
            raise CheckpointError(f"{files[0]}: {str(name)[:60]} is no tensor, or another on other tensor ranks; give "
                                  "a checkpoint of megatron-core's BERT, all from one run")
        merged[name] = _joined(parts, split_dim(name))
    return merged


def _joined(parts: Sequence[StoredTensor], dim: int | None) -> StoredTensor:
    """The tensor ranks' parts, one behind another."""
    first = parts[0]
    if dim is None or len(parts) == 1 or dim >= len(first.shape):
        return first
    size = first.shape[dim]
    whole = tuple(len(parts) * length if at == dim else length for at, length in enumerate(first.shape))
    return StoredTensor(whole, first.dtype, tuple(
        Piece(tuple(rank * size if at == dim else 0 for at in range(len(whole))), part.shape, part.read_box)
        for rank, part in enumerate(parts)))


def _model(weights: Weights, rank: tuple[int, int], stage: tuple[int, int]) -> dict[str, Any]:
    """What a file holds of the model; `rank` and `stage`: the number, and of how many."""
    (at, depth), first = stage, stage[0] * (weights.num_layers // stage[1])
    layers = range(first, first + weights.num_layers // depth)
    model: dict[str, Any] = OrderedDict()
    for name, tensor in weights.tensors.items():
        match = LAYER.fullmatch(name)
        is_here = int(match[1]) in layers if match else at == (0 if name.startswith("embedding.") else depth - 1)
        if is_here:
            model[_numbered(name, -first)] = _part(name, tensor, *rank)
    model |= {f"encoder.layers.{number}.{extra}": None for number in range(len(layers)) for extra in LAYER_EXTRAS}
    if at == depth - 1:
        if depth > 1:
            model[OUTPUT] = _part(OUTPUT, weights.tensors[WORDS], *rank)
        model[OUTPUT_EXTRA] = None
    return model


def _part(name: str, whole: StoredTensor, rank: int, num_ranks: int) -> StoredTensor:
    dim = split_dim(name)
    if dim is None or num_ranks == 1:
        return whole
    size = whole.shape[dim] // num_ranks
    return whole.part(tuple(slice(rank * size, (rank + 1) * size) if at == dim else slice(0, length)
                            for at, length in enumerate(whole.shape)))


def _numbered(name: str, added: int) -> str:
    """The same with its layer's number higher by `added`."""
    match = LAYER.fullmatch(name)
    return f"encoder.layers.{int(match[1]) + added}.{match[2]}" if match else name
