"""Reports on a checkpoint of any format: its configuration, statistics of its tensors, and whether it is intact."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron.checkpoint.contents import Checkpoint, StoredTensor, Tensors
from megatron.checkpoint.convert.formats import read_as
from megatron.checkpoint.convert.torch_files import check_torch_files
from megatron.checkpoint.manifest import check_files
from megatron.errors import CheckpointError, ConfigError
from megatron.log import Log


@dataclass
class _Sum:
    """Totals over some tensors."""

    num_tensors: int = 0
    num_values: int = 0
    num_bytes: int = 0
    square: float = 0.0  # sum of the squares of all values
    num_odd: int = 0  # values that are NaN or infinite


def inspect(path: Path, loader: str, iteration: int | None, log: Log) -> bool:
    """Log a report on a checkpoint; returns whether its files are intact and all its values finite.

    Reads each tensor once. Raises CheckpointError if it cannot be opened, ConfigError if there is nothing at `path` or
    it is a checkpoint of another iteration.
    """
    if not path.exists():
        raise ConfigError(f"{path} is not there; give a run's folder, a checkpoint's or a file")
    name, checkpoint = read_as(loader, path, iteration)
    log.line(f"{checkpoint.path}: {name}, iteration {checkpoint.iteration}")
    for line in _facts(checkpoint):
        log.line(f"  {line}")
    try:
        check_files(checkpoint.path, log)
        check_torch_files(checkpoint.path)
        sums = [_told(kind, tensors, log) for kind, tensors in _kinds(checkpoint).items()]
    except CheckpointError as error:
        log.line(f"not whole: {error}")
        return False
    odd = sum(part.num_odd for part in sums)
    log.line(f"whole, but {odd:,} numbers are NaN or infinite" if odd else "whole, and all numbers are finite")
    return not odd


def _facts(checkpoint: Checkpoint) -> Iterator[str]:
    """Lines on the checkpoint's state, files and configuration."""
    state = checkpoint.state
    for name in ("progress", "schedule", "loss_scale", "layout"):
        if name in state:
            yield f"{name.replace('_', ' ')}: {_shown(state[name])}"
    for note in state.get("notes", ()):
        yield f"note: {note}"
    files = [file for file in (checkpoint.path.rglob("*") if checkpoint.path.is_dir() else [checkpoint.path])
             if file.is_file()]
    yield f"files: {len(files)}, {_size(sum(file.stat().st_size for file in files))}"
    yield "configuration:"
    for name, value in sorted(state.get("config", {}).items()):
        yield f"  {name} {'.' * max(2, 46 - len(name))} {_shown(value)}"


def _kinds(checkpoint: Checkpoint) -> dict[str, Tensors]:
    """The parameters, their average, and each kind of optimizer state, by a title; scalars are left out."""
    kinds: dict[str, dict[str, StoredTensor]] = {"parameters": dict(checkpoint.model)}
    if checkpoint.average is not None:
        kinds["average"] = dict(checkpoint.average)
    for key, tensor in (checkpoint.optimizer or {}).items():
        kind, _, name = key.partition("/")
        if tensor.shape:
            kinds.setdefault(kind, {})[name] = tensor
    return dict(kinds)


def _told(kind: str, tensors: Tensors, log: Log) -> _Sum:
    """Log statistics of some tensors and return the totals; parameters get a line each, others only if not finite."""
    total, width = _Sum(), max(map(len, tensors), default=0)
    log.line(f"  {kind}:")
    for name, tensor in tensors.items():
        values = tensor.read()
        norm = torch.linalg.vector_norm(values, dtype=torch.float64).item() if values.is_floating_point() else 0.0
        num_odd = int((~torch.isfinite(values)).sum())
        total.num_tensors, total.num_values = total.num_tensors + 1, total.num_values + values.numel()
        total.num_bytes, total.num_odd = total.num_bytes + values.nbytes, total.num_odd + num_odd
        total.square += norm**2
        if kind == "parameters" or num_odd:
            largest = values.abs().max().item() if values.numel() else 0.0
            odd = f", {num_odd:,} NaN or infinite" if num_odd else ""
            log.line(f"    {name:<{width}} {' x '.join(map(str, tensor.shape)) or 'scalar':>14} "
                     f"{str(tensor.dtype).removeprefix('torch.')}, norm {norm:.5g}, largest {largest:.5g}{odd}")
    log.line(f"    in all {total.num_tensors} tensors, {total.num_values:,} numbers, {_size(total.num_bytes)}, "
             f"norm {math.sqrt(total.square):.6g}")
    return total


def _shown(value: object) -> str:
    """A value of the state or configuration as text."""
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {part}" for name, part in value.items())
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
