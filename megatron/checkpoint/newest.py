"""Opens what `--load` names: the newest complete checkpoint of a run, or a checkpoint of another program."""

from functools import partial
from pathlib import Path
from typing import Any

from megatron.checkpoint import store
from megatron.checkpoint.contents import Checkpoint
from megatron.checkpoint.convert.formats import CheckpointFormat, foreign
from megatron.checkpoint.convert.torch_files import check_torch_files
from megatron.errors import CheckpointError
from megatron.log import Log
from megatron.parallel.collectives import all_gather_object
from megatron.parallel.mesh import Axis


def open_newest(folder: str, world: Axis, log: Log, with_optimizer: store.WithOptimizer = True) -> Checkpoint | None:
    """The checkpoint to resume from, the same on all ranks, which call this together; None if there is none.

    `with_optimizer`: whether the optimizer's state is needed. Raises CheckpointError on all ranks if there are
    checkpoints but none can be read.
    """
    place = Path(folder)
    known = foreign(place)
    if any(all_gather_object(known is not None, world)):
        checkpoint = store.on_all(partial(_foreign, known, place, world), world)
        for note in checkpoint.state.get("notes", ()):
            log.line(f"note: {note}")
        return checkpoint
    return store.find(folder, world, log, with_optimizer)


def saved_flags(folder: str) -> dict[str, Any]:
    """The flags stored in the checkpoint that `--load` would open, by field name; {} if there is none."""
    place = Path(folder)
    known = foreign(place)
    try:
        found = store.open_place(store.place_in(place)) if known is None else known.read(place)
    except CheckpointError:  # loading it reports the error
        return {}
    config = found.state.get("config")
    return config if isinstance(config, dict) else {}


def _foreign(known: CheckpointFormat | None, place: Path, world: Axis) -> Checkpoint:
    """The checkpoint of another program; the ranks share its checking. Raises CheckpointError."""
    if known is None:
        raise CheckpointError(f"{place} does not hold the same on all hosts; give a folder that they share")
    checkpoint = known.read(place)
    check_torch_files(checkpoint.path, world)
    return checkpoint
