"""What `--load` names: the newest whole checkpoint of a run, or that of another program."""

from pathlib import Path
from typing import Any

from megatron.checkpoint import store
from megatron.checkpoint.convert.formats import foreign
from megatron.checkpoint.stored import Checkpoint
from megatron.errors import CheckpointError
from megatron.log import Log
from megatron.parallel.collectives import everyones
from megatron.parallel.mesh import Axis


def newest(folder: str, world: Axis, log: Log, with_optimizer: bool = True) -> Checkpoint | None:
    """The checkpoint to go on from, the same on all ranks, which call this together; None where there is none.

    Raises CheckpointError, on one rank at least, where none can be read.
    """
    known = foreign(Path(folder))
    kinds = everyones(known is not None, world)
    if len(set(kinds)) > 1:
        raise CheckpointError(f"{folder} does not hold the same on all hosts; give a folder that they share")
    if known is None:
        return store.find(folder, world, log, with_optimizer)
    checkpoint = known.read(Path(folder))
    for note in checkpoint.state.get("notes", ()):
        log.line(f"note: {note}")
    return checkpoint


def saved_flags(folder: str) -> dict[str, Any]:
    """The flags of what is to be loaded from a folder, by their fields' names; {} where there is nothing."""
    known = foreign(Path(folder))
    if known is None:
        return store.saved_flags(folder)
    try:
        return known.read(Path(folder)).state["config"]
    except CheckpointError:  # what is wrong is said where it is loaded
        return {}
