"""Decides what `--precision auto` means: some processors multiply faster in bf16 than in fp32, others emulate it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from megatron.config import Config
from megatron.log import Log
from megatron.parallel.mesh import Mesh
from megatron.parallel.waits import read
from megatron.train.setup.peak import gain_of_bf16
from megatron.train.step.agreement import summed

LEAST_GAIN = 1.2  # speed of bf16 matrix products over fp32's; they take some two thirds of a step


def with_precision_chosen(config: Config, saved: Mapping[str, Any] | None, mesh: Mesh, log: Log) -> Config:
    """`config` with fp32 or bf16 in place of `--precision auto`; a collective: rank 0 measures, and all ranks follow.

    `saved`: the flags of the checkpoint that the run resumes from, if any, whose precision it keeps.
    """
    if config.precision.precision != "auto":
        return config
    if saved is not None and {"fp16", "bf16"} <= saved.keys():
        chosen = {name: bool(saved[name]) for name in ("fp16", "bf16")}
        why = "as in the run that is resumed"
    else:
        is_bf16, gain = _measured(config, mesh)
        chosen, why = {"bf16": is_bf16}, _in_words(gain)
    names = [name for name, is_chosen in chosen.items() if is_chosen]
    log.line(f"precision: {names[0] if names else 'fp32'}; {why}")
    settled: dict[str, Any] = {"precision": None, **chosen}
    return replace(config, precision=replace(config.precision, **settled))


def precision_here(config: Config) -> tuple[str, str]:
    """What `--precision auto` means on the first GPU, or on the CPU if there is none: fp32 or bf16, and why."""
    gain = _gain(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return "bf16" if gain >= LEAST_GAIN else "fp32", _in_words(gain)


def _measured(config: Config, mesh: Mesh) -> tuple[bool, float]:
    """Whether to take bf16, the same on all ranks, and its speed-up over fp32, which is 0 on all ranks but the first.
    """
    gain = _gain(config, mesh.device) if mesh.world.rank == 0 else 0.0
    votes = summed([gain >= LEAST_GAIN], mesh.world, mesh.device)
    return bool(read(votes)), gain


def _gain(config: Config, device: torch.device) -> float:
    """How many times as fast `device` multiplies in bf16 as in fp32, in products of a micro-batch."""
    return gain_of_bf16(device, config.training.micro_batch_size * config.data.seq_length, config.model)


def _in_words(gain: float) -> str:
    return f"this device multiplies {gain:.2f} times as fast in bf16 as in fp32"
