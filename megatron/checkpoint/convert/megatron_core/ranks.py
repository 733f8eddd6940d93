"""megatron-core's BERT with a file for each rank (--ckpt-format torch), of any tensor- and pipeline-parallel size.

Names are written as in the model of `--spec local`. Megatron-LM loads the result with --finetune, or with
--no-load-optim and --no-load-rng.
"""

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.checkpoint.contents import Checkpoint, StoredTensor, Tensors, joined, split
from megatron.checkpoint.convert.megatron_core.arguments import checkpoint_of
from megatron.checkpoint.convert.megatron_core.names import LAYER_EXTRAS, OUTPUT, OUTPUT_EXTRA, is_extra
from megatron.checkpoint.convert.megatron_core.weights import weights_of
from megatron.checkpoint.convert.megatron_v2.names import num_layers, renumbered, split_dim, stage_of
from megatron.checkpoint.convert.megatron_v2.places import any_file, find_place
from megatron.checkpoint.convert.megatron_v2.rank_files import read_rank_files, refuse_other_replicas, write_rank_files
from megatron.checkpoint.convert.torch_files import has_mark
from megatron.checkpoint.convert.vocabulary import WORDS
from megatron.errors import CheckpointError


def recognises(path: Path) -> bool:
    """Whether `path` looks like a checkpoint of this format, or a folder of them; opens no pickle."""
    return has_mark(path, any_file, b"self_attention.linear_")


def read(path: Path, iteration: int | None = None) -> Checkpoint:
    """The weights of `iteration`, or the newest, in a run's folder; or those in an iter_ folder or a rank's file.

    Its `state` has the same entries as that of `megatron_v2.reading.read`. Raises CheckpointError.
    """
    place = find_place(path, iteration)
    trees = read_rank_files(place, "Megatron-LM")
    sizes, first = (len(trees[0]), len(trees)), trees[0][0]
    # The model's layers go through the first virtual stage of every pipeline rank, then the second of every, ...
    chunks = [key for number in range(len(first)) if (key := f"model{number}") in first] or ["model"]
    theirs: dict[str, StoredTensor] = {}
    depth = 0
    for chunk, stage in itertools.product(chunks, range(sizes[1])):
        merged = _merged([tree.get(chunk) for tree in trees[stage]], place.files[stage])
        theirs |= {renumbered(name, depth): tensor for name, tensor in merged.items()}
        depth += num_layers(merged)
    return checkpoint_of(place.path, theirs, first, sizes)


def write(checkpoint: Checkpoint, folder: Path, *, tensor: int = 1, pipeline: int = 1) -> Path:
    """Write the weights for `tensor` x `pipeline` ranks and the pointer into a run's folder; returns their path.

    The vocabulary is padded as Megatron does for so many tensor ranks; padding is never predicted. Raises ConfigError
    if the model cannot be divided so, CheckpointError if megatron-core has no such model or the disk refuses.
    """
    weights, beside = weights_of(checkpoint, tensor, pipeline)
    beside["args"].spec = ["local"]
    return write_rank_files(folder, checkpoint.iteration, tensor, pipeline, lambda rank, stage: beside | {
        "model": _model(weights, (rank, tensor), (stage, pipeline))})


def _merged(ranks: Sequence[Any], files: Sequence[Path]) -> dict[str, StoredTensor]:
    """The whole tensors of a stage, joined from its tensor ranks' files; raises CheckpointError if they do not fit."""
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
        refuse_other_replicas(name, parts, files)
        merged[name] = joined(parts, split_dim(name))
    return merged


def _model(weights: Tensors, rank: tuple[int, int], stage: tuple[int, int]) -> dict[str, Any]:
    """The entry `model` of a file; `rank` (tensor) and `stage` (pipeline): the index and how many there are."""
    (at, num_stages), depth = stage, num_layers(weights)
    num_here = depth // num_stages
    model: dict[str, Any] = OrderedDict(
        (renumbered(name, -at * num_here), split(tensor, split_dim(name), *rank))
        for name, tensor in weights.items() if stage_of(name, depth, num_stages) == at)
    model |= {f"encoder.layers.{number}.{extra}": None for number in range(num_here) for extra in LAYER_EXTRAS}
    if at == num_stages - 1:
        if at:
            model[OUTPUT] = split(weights[WORDS], split_dim(OUTPUT), *rank)
        model[OUTPUT_EXTRA] = None
    return model
