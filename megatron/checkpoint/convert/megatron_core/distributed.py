"""megatron-core's BERT in the format that any layout loads (--ckpt-format torch_dist).

The same parameter of all layers may be stacked into one tensor [layers, …] there, or each stored by itself; we write
stacks and read both. Megatron-LM loads the result with any --spec, and with --finetune, or --no-load-optim and
--no-load-rng.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron.checkpoint.contents import Checkpoint, StoredTensor, Tensors, one_piece
from megatron.checkpoint.convert.megatron_core.arguments import checkpoint_of
from megatron.checkpoint.convert.megatron_core.distributed_files import (
    SAYS,
    Chunk,
    holds_index,
    is_distributed,
    read_common,
    read_tensors,
    write_distributed,
)
from megatron.checkpoint.convert.megatron_core.names import FUSED, LAYER, LAYER_EXTRAS, OUTPUT_EXTRA
from megatron.checkpoint.convert.megatron_core.weights import weights_of
from megatron.checkpoint.convert.megatron_v2.arguments import arguments_in
from megatron.checkpoint.convert.megatron_v2.names import num_layers
from megatron.checkpoint.convert.megatron_v2.places import RELEASE, newest, place_for
from megatron.checkpoint.convert.torch_files import refuse_stand_in
from megatron.checkpoint.failures import new_checkpoint
from megatron.errors import CheckpointError

_STACK = re.compile(r"encoder\.layers\.([a-z].*)")
_OPTIMIZER = re.compile(r"(optimizer|chained_[0-9]+)\..*")
_MOST_LAYERS = 10_000


def recognises(path: Path) -> bool:
    """Whether `path` looks like a checkpoint of this format, or a folder of them; opens no pickle."""
    try:
        return is_distributed(_place_in(path, None))
    except (CheckpointError, OSError):
        return False


def refuse_half(path: Path) -> None:
    """Raises CheckpointError if `path` would be a checkpoint of this format, were its metadata.json there."""
    place = path
    with suppress(CheckpointError, OSError):
        place = path if holds_index(path) else path / newest(path)
    if holds_index(place) and not is_distributed(place):
        refuse_stand_in(place / SAYS)


def read(path: Path, iteration: int | None = None) -> Checkpoint:
    """The weights of `iteration`, or the newest, in a run's folder; or those in an iter_ folder.

    Its `state` has the same entries as that of `megatron_v2.reading.read`. Raises CheckpointError.
    """
    place = _place_in(path, iteration)
    if not is_distributed(place):
        raise CheckpointError(f"{place}: has no metadata.json that says torch_dist, and .metadata; give a folder of "
                              "megatron-core's --ckpt-format torch_dist")
    theirs: dict[str, StoredTensor] = {}
    for name, tensor in read_tensors(place).items():
        if match := _STACK.fullmatch(name):
            if not tensor.shape or tensor.shape[0] > _MOST_LAYERS:
                raise CheckpointError(f"{place}: {name} is of no number of layers; copy it again")
            theirs |= {f"encoder.layers.{number}.{match[1]}": _layer(tensor, number)
                       for number in range(tensor.shape[0])}
        elif not _OPTIMIZER.fullmatch(name):
            theirs[name] = tensor
    common = read_common(place)
    given = arguments_in(common)
    layout = [given.get(f"{what}_model_parallel_size", 1) for what in ("tensor", "pipeline")]
    return checkpoint_of(place, theirs, common, (layout[0], layout[1]))


def write(checkpoint: Checkpoint, folder: Path, *, tensor: int = 1, pipeline: int = 1) -> Path:
    """Write the weights and the pointer into a run's folder; returns their path.

    `tensor` x `pipeline`: the layout that the vocabulary is padded for, and that is stored in the arguments. Raises
    ConfigError if the model cannot be divided so, CheckpointError if megatron-core has no such model or the disk
    refuses.
    """
    weights, beside = weights_of(checkpoint, tensor, pipeline)
    place = place_for(folder, checkpoint.iteration)
    with new_checkpoint(place, checkpoint.iteration or RELEASE) as temporary:
        write_distributed(temporary, _chunks(weights), _extras(num_layers(weights)), beside)
    return place


def _place_in(path: Path, iteration: int | None) -> Path:
    """The folder of a checkpoint: `path` itself, or in the run's folder `path` that of `iteration` or the newest."""
    if is_distributed(path) or not path.is_dir():
        return path
    return path / newest(path) if iteration is None else place_for(path, iteration)


def _layer(stack: StoredTensor, number: int) -> StoredTensor:
    """The tensor of layer `number` out of a stack over all layers."""
    return one_piece(stack.shape[1:], stack.dtype,
                     lambda box: stack.read_box((slice(number, number + 1), *box))[0])


def _chunks(weights: Tensors) -> Iterator[Chunk]:
    """All tensors, those of layers as chunks of stacks [layers, …]."""
    depth = num_layers(weights)
    for name, tensor in weights.items():
        zeros = (0,) * len(tensor.shape)
        if match := LAYER.fullmatch(name):
            yield Chunk(f"encoder.layers.{_fused(match[2])}", (depth, *tensor.shape),
                        (int(match[1]), *zeros), tensor)
        else:
            yield Chunk(name, tensor.shape, zeros, tensor)


def _fused(name: str) -> str:
    """A name with its LayerNorm inside the linear layer that follows it."""
    for plain, fused in FUSED.items():
        if name.startswith(plain):
            return fused + name.removeprefix(plain)
    return name


def _extras(depth: int) -> dict[str, Any]:
    """The empty entries for the FP8 state of all modules."""
    return {**{f"encoder.layers.{extra}/shard_{number}_{depth}": None for extra in LAYER_EXTRAS
               for number in range(depth)}, f"{OUTPUT_EXTRA}/shard_0_1": None}
