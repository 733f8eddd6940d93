"""Reads and writes the files per rank of Megatron v2, which megatron-core's `--ckpt-format torch` shares."""

import filecmp
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.contents import StoredTensor, Tensors
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

    Raises CheckpointError if one is not a dict, if there are fewer or more files than the run had ranks, or if they
    are not of one iteration, or not each in its rank's place.
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
    _refuse_other_iterations(place, trees)
    _refuse_other_places(place, trees)
    return trees


def refuse_other_replicas(name: str, parts: Sequence[StoredTensor], files: Sequence[Path]) -> None:
    """Raises CheckpointError if the LayerNorm weight `name` is not the same in the tensor ranks' `files`.

    Each tensor rank holds all of it, so that this tells files of different runs. Passes for any other parameter.
    """
    if not name.endswith(("norm.weight", "norm_weight")):
        return
    first = parts[0].read()
    for part, file in zip(parts[1:], files[1:], strict=True):
        # Not bit for bit: on some machines the ranks of one run drift apart by rounding.
        if not torch.allclose(part.read().float(), first.float(), rtol=0.01, atol=0.001, equal_nan=True):
            raise CheckpointError(f"{file}: {name} is another than in {files[0]}; copy both again, from one run")


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


def _refuse_other_iterations(place: Place, trees: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Raises CheckpointError if the ranks' files were not saved at one iteration."""
    numbers = [str(tree.get("iteration", tree.get("total_iters"))) for stage in trees for tree in stage]
    for number, file in zip(numbers, itertools.chain(*place.files), strict=True):
        if number != numbers[0]:
            raise CheckpointError(f"{file}: is of iteration {number[:40]}, and {place.files[0][0]} of "
                                  f"{numbers[0][:40]}; copy both again, from one checkpoint")


def _refuse_other_places(place: Place, trees: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Raises CheckpointError if a rank's file is that of another rank, by its arguments, or a copy of another file."""
    num_pipeline, num_tensor = len(trees), len(trees[0])
    given = {(stage, rank): arguments_in(trees[stage][rank]) for stage in range(num_pipeline)
             for rank in range(num_tensor)}
    says = {at: arguments.get("rank") for at, arguments in given.items()}
    if len(set(map(str, says.values()))) == len(says) > 1:  # tools that split a checkpoint may repeat a number
        for at, number in says.items():
            places = [other for other in given if type(number) is not int or _is_place(
                number, other, given[at], num_tensor, num_pipeline)]
            if at not in places:
                stage, rank = places[0] if places else next(other for other in given if other != at)
                raise CheckpointError(f"{place.files[at[0]][at[1]]}: was saved by rank {number}, as its arguments say, "
                                      f"and may have changed places with {place.files[stage][rank]}; copy all again")
    for other, file in itertools.combinations(itertools.chain(*place.files), 2):
        if filecmp.cmp(other, file, shallow=False):  # which ends where they begin to differ
            raise CheckpointError(f"{file}: is a copy of {other}, and not this rank's part; copy it again")


def _is_place(number: int, at: tuple[int, int], given: Mapping[str, Any], num_tensor: int, num_pipeline: int) -> bool:
    """Whether the global rank `number`, with these arguments, may be at a pipeline stage and tensor rank (`at`).

    Neighbours are tensor ranks; then come either data-parallel ranks, or with --use-tp-pp-dp-mapping the stages.
    """
    stage, rank = at
    if number % num_tensor != rank:
        return False
    sizes = [given.get("world_size"), given.get("context_parallel_size", 1)]
    if num_pipeline == 1 or not all(type(size) is int and size > 0 for size in sizes) or sizes[0] < num_pipeline:
        return True
    return stage in (number // (sizes[0] // num_pipeline), number // (num_tensor * sizes[1]) % num_pipeline)


def _tree(file: Path, program: str) -> dict[str, Any]:
    """The content of a rank's file; raises CheckpointError."""
    tree = read_torch_file(file)
    if not isinstance(tree, dict):
        raise CheckpointError(f"{file}: holds a {type(tree).__name__}, not a checkpoint; give a {FILE} of {program}")
    return tree
