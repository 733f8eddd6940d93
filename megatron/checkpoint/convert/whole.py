"""This program's whole-file format: plain safetensors files of the model, the optimizer's state and the average."""

from pathlib import Path

import torch

from megatron.checkpoint.contents import Checkpoint, Tensors
from megatron.checkpoint.failures import new_checkpoint, refuse_layout
from megatron.checkpoint.places import STATE, place_of
from megatron.checkpoint.store import place_in
from megatron.checkpoint.tensor_file import write_tensors
from megatron.checkpoint.whole import MODEL, VERSION, read_whole
from megatron.errors import CheckpointError
from megatron.files import sync, write_json


def recognises(path: Path) -> bool:
    """Whether `path` is a checkpoint of this format, or a folder of them."""
    try:
        return (place_in(path) / MODEL).is_file()
    except (CheckpointError, OSError):
        return False


def read(path: Path, iteration: int | None = None) -> Checkpoint:
    """The checkpoint at `path`, or that of `iteration` (by default the newest) in a run's folder.

    Raises CheckpointError.
    """
    return read_whole(place_in(path, iteration))


def write(checkpoint: Checkpoint, folder: Path, *, tensor: int = 1, pipeline: int = 1) -> Path:
    """Write a checkpoint and the pointer into a run's folder, one tensor in memory at a time; returns its path.

    Raises ConfigError for a layout other than 1 x 1, CheckpointError if the disk refuses.
    """
    refuse_layout(tensor, pipeline)
    place = place_of(folder, checkpoint.iteration)
    with new_checkpoint(place, checkpoint.iteration) as temporary:
        for kind, tensors in kinds_of(checkpoint).items():
            write_tensors(temporary / f"{kind}.safetensors", tensors)
        write_json(temporary / STATE, {**checkpoint.state, "version": VERSION, "iteration": checkpoint.iteration})
        sync(temporary / STATE)
    return place


def kinds_of(checkpoint: Checkpoint) -> dict[str, Tensors]:
    """The tensors to write, by kind: "model" (the parameters, in fp32), "optimizer" and "ema", if there are any."""
    model = {name: tensor.to(torch.float32) for name, tensor in checkpoint.model.items()}
    kinds: dict[str, Tensors | None] = {"model": model, "optimizer": checkpoint.optimizer, "ema": checkpoint.average}
    return {kind: tensors for kind, tensors in kinds.items() if tensors is not None}
