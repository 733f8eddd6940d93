"""Reads and writes the files per rank of Megatron v2, which megatron-core's `--ckpt-format torch` shares."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.checkpoint.contents import Tensors
from megatron.checkpoint.convert.megatron_v2.arguments import arguments_in
from megatron.checkpoint.convert.megatron_v2.names import num_layers
from megatron.checkpoint.convert.megatron_v2.places import FILE, RELEASE, Place, place_for, rank_name
from megatron.checkpoint.convert.torch_files import read_torch_file
from megatron.checkpoint.convert.torch_writing import write_torch_file
from megatron.checkpoint.failures import new_checkpoint
from megatron.errors import CheckpointError, ConfigError
from megatron.files import sync


def read_rank_files(place: Place, program: str) -> list[list[dict[str, Any]]]:
    """The content of each rank's file, as [pipeline rank][tensor rank]; `program`: who writes them, for messages.

    Raises CheckpointError if one is not a dict, or if there are fewer or more files than the run had ranks.
    """
    trees = [[_tree(file, program) for file in stage] for stage in place.files]
    arguments = arguments_in(trees[0][0])
    for what, found, names in (
            ("tensor", len(trees[0]), ("tensor_model_parallel_size", "model_parallel_size")),
            ("pipeline", len(trees), ("pipeline_model_parallel_size",))):
        said = next((arguments[name] for name in names if name in arguments), found)
        if said != found:
            raise CheckpointError(f"{place.path}: has files of {found} {what}-parallel ranks, but was written by {said}"
                                  "; copy the others' as well")
    return trees


def check_divisions(tensor: int, pipeline: int, heads: int, model: Tensors) -> None:
    """Raises ConfigError unless `tensor` divides the attention heads and feed-forward width, `pipeline` the layers."""
    width = model["transformer.layers.0.mlp.dense_h_to_4h.bias"].shape[0]
    for kind, ranks, what, size in (("tensor", tensor, "attention heads", heads),
                                    ("tensor", tensor, "columns of the feed-forward layers", width),
                                    ("pipeline", pipeline, "layers", num_layers(model))):
        if ranks < 1 or size % ranks:
            raise ConfigError(f"the {kind}-parallel size to write for is {ranks}, by which {size} {what} cannot be "
                              "divided; give a divisor")


def write_rank_files(folder: Path, iteration: int, tensor: int, pipeline: int,
                     tree: Callable[[int, int], dict[str, Any]]) -> Path:
    """Write `tree(tensor rank, pipeline rank)` for each rank, and the pointer, into a run's folder; returns the path.

    Raises CheckpointError if the disk refuses.
    """
    place = place_for(folder, iteration)
    with new_checkpoint(place, iteration or RELEASE) as temporary:
        for stage, rank in itertools.product(range(pipeline), range(tensor)):
            part = temporary / rank_name(rank, stage, pipeline)
            part.mkdir()
            write_torch_file(part / FILE, tree(rank, stage))
            sync(part / FILE)
            sync(part)
    return place


def _tree(file: Path, program: str) -> dict[str, Any]:
    """The content of a rank's file; raises CheckpointError."""
    tree = read_torch_file(file)
    if not isinstance(tree, dict):
        raise CheckpointError(f"{file}: holds a {type(tree).__name__}, not a checkpoint; give a {FILE} of {program}")
    return tree
