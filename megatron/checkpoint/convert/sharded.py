"""The format in which this program saves, written as by a single rank: a manifest, and a file for each kind of tensor.
"""

import time
from pathlib import Path

from megatron.checkpoint.contents import Checkpoint
from megatron.checkpoint.convert.whole import kinds_of
from megatron.checkpoint.failures import new_checkpoint, refuse_layout
from megatron.checkpoint.manifest import MANIFEST, Manifest, TensorFacts
from megatron.checkpoint.store import STATE, open_place, place_in, place_of
from megatron.checkpoint.tensor_file import FileFacts, facts_of_file, write_tensors
from megatron.errors import CheckpointError
from megatron.files import write_json


def recognises(path: Path) -> bool:
    """Whether `path` is a checkpoint of this format, or a folder of them."""
    try:
        return (place_in(path) / MANIFEST).is_file()
    except (CheckpointError, OSError):
        return False


def read(path: Path, iteration: int | None = None) -> Checkpoint:
    """The checkpoint at `path`, or that of `iteration` (by default the newest) in a run's folder.

    Raises CheckpointError.
    """
    return open_place(place_in(path, iteration))


def write(checkpoint: Checkpoint, folder: Path, *, tensor: int = 1, pipeline: int = 1) -> Path:
    """Write a checkpoint and the pointer into a run's folder, one tensor in memory at a time; returns its path.

    Raises ConfigError for a layout other than 1 x 1, CheckpointError if the disk refuses.
    """
    refuse_layout(tensor, pipeline)
    place = place_of(folder, checkpoint.iteration)
    files: dict[str, FileFacts] = {}
    tensors: dict[str, TensorFacts] = {}
    with new_checkpoint(place, checkpoint.iteration) as temporary:
        for kind, held in kinds_of(checkpoint).items():
            file = f"{kind}-00000.safetensors"
            files[file] = write_tensors(temporary / file, held)
            tensors |= {f"{kind}/{name}": TensorFacts(tensor.shape, tensor.dtype, (
                ((0,) * len(tensor.shape), tensor.shape, file),)) for name, tensor in held.items()}
        write_json(temporary / STATE, {**checkpoint.state, "written_s": time.time()})
        files[STATE] = facts_of_file(temporary / STATE)
        Manifest(checkpoint.iteration, files, tensors).write(temporary)
    return place
