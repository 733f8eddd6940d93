"""Reads checkpoints in the whole-file form, which --to whole writes: all parameters in one safetensors file.

PLACE/model.safetensors        every parameter, fp32, by name
PLACE/optimizer.safetensors    every state tensor, as KIND/PARAMETER, if there is any
PLACE/ema.safetensors          the average of the weights, by name, if there is one
PLACE/state.json               version of this form, progress, loss scale, the flags of the run
"""

import json
from pathlib import Path

from megatron.checkpoint.contents import Checkpoint
from megatron.checkpoint.places import STATE
from megatron.checkpoint.tensor_file import stored_in
from megatron.errors import CheckpointError

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
AVERAGE = "ema.safetensors"
VERSION = 1


def read_whole(place: Path, with_optimizer: bool = True) -> Checkpoint:
    """The checkpoint in a folder, whose tensors are read lazily.

    Raises CheckpointError if it is damaged, or of another version.
    """
    try:
        state = json.loads((place / STATE).read_text(encoding="utf-8"))
        iteration, version = int(state["iteration"]), state.get("version", VERSION)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{place / STATE}: damaged or missing ({error}); load an older iteration") from None
    if version != VERSION:
        raise CheckpointError(f"{place / STATE} has version {version}, and this program reads {VERSION}; convert it "
                              "with the program that wrote it")
    optimizer, average = place / OPTIMIZER, place / AVERAGE
    return Checkpoint(place, iteration, stored_in(place / MODEL),
                      stored_in(optimizer) if with_optimizer and optimizer.exists() else None, state,
                      stored_in(average) if average.exists() else None)
