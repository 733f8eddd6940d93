"""The file of a contact regression that was fitted on a checkpoint's attention maps.

It is stored beside the weights, in CHECKPOINT/contact_head.json, or NAME-contact_head.json if the checkpoint is one
file: "weight" (one number for each attention head of all blocks), "bias", and facts about the fit. The checkpoint's
own files are not changed.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.contents import Checkpoint, stored
from megatron.errors import CheckpointError, OutputError
from megatron.files import write_json

NAME = "contact_head.json"
WEIGHT, BIAS = "contact_head.weight", "contact_head.bias"


def contact_head_file(path: Path) -> Path:
    """The path of the fitted regression of the checkpoint at `path`, whether or not it exists."""
    return path / NAME if path.is_dir() else path.with_name(f"{path.stem}-{NAME}")


def write_contact_head(path: Path, weight: Sequence[float], bias: float, facts: Mapping[str, Any]) -> Path:
    """Write the regression of the checkpoint at `path`, replacing any earlier one; returns its file.

    `facts`: how it was fitted, stored as they are. Raises OutputError if the file cannot be written.
    """
    file = contact_head_file(path)
    try:
        write_json(file, {"weight": list(weight), "bias": bias, **facts})
    except OSError as error:
        raise OutputError(f"{file} cannot be written ({error.strerror}); a regression lies beside its checkpoint: "
                          "give a copy of that where you may write") from None
    return file


def with_contact_head(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the regression from its contact_head.json as contact head; unchanged if there is no file.

    A contact head that the checkpoint itself has is replaced. Raises CheckpointError if the file is damaged or belongs
    to another model.
    """
    file = contact_head_file(checkpoint.path)
    if not file.is_file():
        return checkpoint
    config = checkpoint.state.get("config", {})
    num_heads = config.get("num_layers", 0) * config.get("num_attention_heads", 0)
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        weight, bias = torch.tensor([fields["weight"]]).float(), torch.tensor([float(fields["bias"])])
        if weight.shape != (1, num_heads) or not math.isfinite(float(weight.sum() + bias)):
            raise ValueError(f"{weight.numel()} weights for {num_heads} heads")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: damaged, or of another model ({error}); remove it, or fit another: "
                              "tools/predict_contacts.py --fit") from None
    return replace(checkpoint, model={**checkpoint.model, WEIGHT: stored(weight), BIAS: stored(bias)},
                   state=checkpoint.state | {"config": config | {"contact_head": True}})
