"""The whole-file form of this program: safetensors that any reader opens, of the model and of the optimizer's state."""

from pathlib import Path

import torch

from megatron.checkpoint.convert.failures import writable
from megatron.checkpoint.convert.own_places import place_in, refuse_layout
from megatron.checkpoint.places import STATE, place_of
from megatron.checkpoint.store import point_to
from megatron.checkpoint.stored import Checkpoint, Tensors
from megatron.checkpoint.tensor_file import TensorEntry, write_tensors
from megatron.checkpoint.whole import AVERAGE, MODEL, OPTIMIZER, VERSION, read_whole
from megatron.errors import CheckpointError
from megatron.files import new_folder, sync, write_json


def recognises(path: Path) -> bool:
    """Whether this is such a checkpoint, or a folder of them."""
    try:
        return (place_in(path) / MODEL).is_file()
    except (CheckpointError, OSError):
        return False


def read(path: Path, iteration: int | None = None) -> Checkpoint:
    """The checkpoint of an iteration, by default of the newest; raises CheckpointError."""
    return read_whole(place_in(path, iteration))


def write(checkpoint: Checkpoint, folder: Path, *, tensor: int = 1, pipeline: int = 1) -> Path:
    """Write a checkpoint below a run's folder, one tensor in memory at a time, and point to it; returns its place.

    Raises ConfigError for a layout, CheckpointError where the disk refuses.
    """
    refuse_layout(tensor, pipeline)
    place = place_of(folder, checkpoint.iteration)
    with writable(place):
        with new_folder(place) as temporary:
            write_tensors(temporary / MODEL, entries(checkpoint.model, torch.float32))
            if checkpoint.optimizer is not None:
                write_tensors(temporary / OPTIMIZER, entries(checkpoint.optimizer))
            if checkpoint.average is not None:
                write_tensors(temporary / AVERAGE, entries(checkpoint.average))
            write_json(temporary / STATE, {**checkpoint.state, "version": VERSION, "iteration": checkpoint.iteration})
            sync(temporary / STATE)
        point_to(folder, checkpoint.iteration)
    return place


def entries(tensors: Tensors, dtype: torch.dtype | None = None) -> dict[str, TensorEntry]:
    """Stored tensors as what is to be written of them, all in one dtype if it is given."""
    return {name: TensorEntry(tensor.shape, dtype or tensor.dtype, tensor.to(dtype or tensor.dtype).read)
            for name, tensor in tensors.items()}
