"""The checkpoint formats that can be read and written, by name, and how to recognise one."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from megatron.checkpoint.contents import Checkpoint
from megatron.checkpoint.convert import megatron_v2, sharded, whole
from megatron.checkpoint.convert.families import esm, hf
from megatron.checkpoint.convert.megatron_core import distributed, ranks
from megatron.checkpoint.convert.megatron_v2.places import any_file
from megatron.checkpoint.convert.torch_files import refuse_stand_in
from megatron.checkpoint.lora.peft_files import CONFIG as ADAPTERS
from megatron.errors import CheckpointError, ConfigError


class CheckpointFormat(Protocol):
    """The functions that a format's module provides."""

    def recognises(self, path: Path) -> bool:
        """Whether `path` looks like a checkpoint of this format, or a folder of them; opens no pickle."""

    def read(self, path: Path, iteration: int | None = None) -> Checkpoint:
        """The checkpoint at `path`, or that of `iteration` in a run's folder; raises CheckpointError."""

    def write(self, checkpoint: Checkpoint, folder: Path, *, tensor: int = 1, pipeline: int = 1) -> Path:
        """Write a checkpoint below `folder` for `tensor` x `pipeline` ranks; returns the path of what was written.

        Raises ConfigError for an unsupported layout, CheckpointError for any other failure.
        """


FORMATS: Mapping[str, CheckpointFormat] = {
    "sharded": sharded, "whole": whole, "hf": hf, "esm": esm, "megatron-v2": megatron_v2, "megatron-core": ranks,
    "megatron-core-dist": distributed}
# Formats for which the optimizer's state is neither read nor written.
WEIGHTS_ALONE = ("megatron-core", "megatron-core-dist", "hf", "esm")
OURS = ("sharded", "whole")
AUTO = "auto"


def foreign(path: Path) -> CheckpointFormat | None:
    """The format of the checkpoint at `path` if it is one of another program, else None.

    Raises CheckpointError for adapters of peft, with or without the model that they belong to, and where a file is
    empty or no checkpoint at all.
    """
    _refuse_adapters(path)
    name = foreign_name(path)
    if name is None and not any(FORMATS[own].recognises(path) for own in OURS):
        _refuse_stand_ins(path)
    return None if name is None else FORMATS[name]


def foreign_name(path: Path) -> str | None:
    """The name of the format of the checkpoint at `path` if it is one of another program, else None."""
    return next((name for name, known in FORMATS.items() if name not in OURS and known.recognises(path)), None)


def read_as(loader: str, path: Path, iteration: int | None) -> tuple[str, Checkpoint]:
    """The name of the format, and the checkpoint at `path` (or that of `iteration`, if `path` is a run's folder).

    `loader`: the name of the format, or AUTO to recognise it. Raises CheckpointError, and ConfigError if `path` is a
    single checkpoint of another iteration.
    """
    _refuse_adapters(path)
    name = recognised(path) if loader == AUTO else loader
    checkpoint = FORMATS[name].read(path, iteration)
    is_one = path.resolve().is_relative_to(checkpoint.path.resolve())
    if is_one and iteration not in (None, checkpoint.iteration):
        raise ConfigError(f"--iteration is {iteration}, but {path} is the checkpoint of iteration "
                          f"{checkpoint.iteration}; leave it out, or give the folder of the run")
    return name, checkpoint


def recognised(path: Path) -> str:
    """The name of the format of the checkpoint at `path`.

    Raises CheckpointError if none is recognised, and for adapters of peft.
    """
    _refuse_adapters(path)
    name = next((name for name, known in FORMATS.items() if known.recognises(path)), None)
    if name is None:
        _refuse_stand_ins(path)
        half = hf.half_of_one(path)
        raise CheckpointError(f"{path} holds {half}; copy the other as well" if half else
                              f"{path} holds no checkpoint of a known format ({', '.join(FORMATS)}); give the folder "
                              "of a run, or of one of its checkpoints")
    return name


def _refuse_adapters(path: Path) -> None:
    """Raises CheckpointError for a folder with adapters of peft: transformers adds them to the weights beside them."""
    if (path / ADAPTERS).is_file():
        beside = "beside a model's weights" if hf.recognises(path) else "and no model"
        raise CheckpointError(f"{path} holds adapters of peft, {beside}; merge them into their model with peft's "
                              "merge_and_unload, save it with save_pretrained to a new folder, and give that")


def _refuse_stand_ins(path: Path) -> None:
    """Raises CheckpointError for what would be another program's checkpoint, were one of its files what it should be.
    """
    distributed.refuse_half(path)
    if path.is_file() and path.suffix != ".pt":
        return
    files = [path] if path.is_file() else sorted(path.glob("*.pt"))
    with suppress(CheckpointError, OSError):
        files.append(any_file(path))
    for file in files:
        refuse_stand_in(file)
