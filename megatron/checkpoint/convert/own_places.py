"""Finds this program's own checkpoints, given the folder of a run or of a single checkpoint."""

from pathlib import Path

from megatron.checkpoint.store import STATE, in_order, iterations
from megatron.errors import CheckpointError, ConfigError


def place_in(path: Path, iteration: int | None = None) -> Path:
    """The folder of a checkpoint: `path` itself if it is one, else that of `iteration` in the run's folder `path`.

    Without an iteration, the one that the run would resume from. Raises CheckpointError if there is none.
    """
    if (path / STATE).is_file():
        return path
    places = in_order(path)[1] if iteration is None else [iterations(path).get(iteration)]
    place = places[0] if places else None
    if place is None:
        what = "checkpoint" if iteration is None else f"iteration {iteration}"
        raise CheckpointError(f"{path} holds no {what}; give the folder of a run, or of one of its checkpoints")
    if not (place / STATE).is_file():
        raise CheckpointError(f"{place} is not of this program: it has no {STATE}; give the format that it is of")
    return place


def refuse_layout(tensor: int, pipeline: int) -> None:
    """Raises ConfigError unless both sizes are 1: our formats have no files per rank, and load into any layout."""
    if (tensor, pipeline) != (1, 1):
        raise ConfigError(f"--target-tensor-parallel-size {tensor} and --target-pipeline-parallel-size {pipeline} are "
                          "for Megatron's files of ranks; this program loads its own into any layout, leave them out")
