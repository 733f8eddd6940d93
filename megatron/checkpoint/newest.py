"""What `--load` names: the newest whole checkpoint of a run, or that of another program."""

from pathlib import Path
from typing import Any

from megatron.checkpoint import store
from megatron.checkpoint.convert.formats import CheckpointFormat, foreign
from megatron.checkpoint.convert.torch_files import check_torch_files
from megatron.checkpoint.stored import Checkpoint
from megatron.errors import CheckpointError
from megatron.log import Log
from megatron.parallel.collectives import all_gather_object
from megatron.parallel.mesh import Axis


def newest(folder: str, world: Axis, log: Log, with_optimizer: store.Wanted = True) -> Checkpoint | None:
    """The checkpoint to go on from, the same on all ranks, which call this together; None where there is none.

    Raises CheckpointError, on all ranks, where none can be read.
    """
    place = Path(folder)
    known = foreign(place)
    if any(all_gather_object(known is not None, world)):
        checkpoint, wrong = _foreign(known, place, world)
        why = next(filter(None, all_gather_object(wrong, world)), None)
        if why is not None:
            raise CheckpointError(why)
        for note in checkpoint.state.get("notes", ()) if checkpoint is not None else ():
            log.line(f"note: {note}")
        return checkpoint
    return store.find(folder, world, log, with_optimizer)


def saved_flags(folder: str) -> dict[str, Any]:
    """The flags of what is to be loaded from a folder, by their fields' names; {} where there is nothing."""
    known = foreign(Path(folder))
    if known is None:
        return store.saved_flags(folder)
    try:
        return known.read(Path(folder)).state["config"]
    except CheckpointError:  # what is wrong is said where it is loaded
        return {}


def _foreign(known: CheckpointFormat | None, place: Path, world: Axis) -> tuple[Checkpoint | None, str | None]:
    """The checkpoint of another program, or what is wrong with it; the ranks share out the reading of its files."""
    if known is None:
        return None, f"{place} does not hold the same on all hosts; give a folder that they share"
    try:
        checkpoint = known.read(place)
        check_torch_files(checkpoint.path, world)
        return checkpoint, None
    except CheckpointError as error:
        return None, str(error)
