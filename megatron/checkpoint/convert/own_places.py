"""Where this program's own checkpoints lie, for those who name a run's folder or one checkpoint's."""

from pathlib import Path

from megatron.checkpoint.store import STATE, in_order, iterations
from megatron.errors import CheckpointError, ConfigError


def place_in(path: Path, iteration: int | None = None) -> Path:
    """The folder of a checkpoint: `path` itself, or that of an iteration, by default of the newest, in a run's folder.

    Raises CheckpointError where there is none.
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
    """Raises ConfigError where files of ranks are asked for: ours are loaded into any layout as they are."""
    if (tensor, pipeline) != (1, 1):
        raise ConfigError(f"--target-tensor-parallel-size {tensor} and --target-pipeline-parallel-size {pipeline} are "
                          "for Megatron's files of ranks; this program loads its own into any layout, leave them out")
