"""Training steps of a checkout of this project, back to its first edition (commit 2ee3fa2).

As a program, started by train_step.py with CHECKOUT MICRO_BATCHES LENGTH,… FLAG …, it takes a step for each line of its
input and answers with the step's seconds and loss; between them it does nothing. It imports nothing but the checkout's.
"""

import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from inspect import signature
from typing import Any

import numpy as np
import torch

VOCABULARY, LEARNING_RATE = 128, 1e-4
TimedStep = Callable[[], tuple[float, float]]


def build_step(checkout: str, micro_batches: int, lengths: Sequence[int], flags: Sequence[str]) -> TimedStep:
    """A step on `micro_batches` rows of such proteins, as the checkout's program takes it: its seconds and its loss."""
    sys.path.insert(0, checkout)
    config, _ = _first("megatron.config.command_line", "megatron.flags").parse(flags)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mesh = import_module("megatron.parallel.mesh").Mesh(device=device)
    engine = _first("megatron.train.step.engine", "megatron.train.engine").build_engine(config, mesh, VOCABULARY)
    meters = _first("megatron.train.step.meters", "megatron.train.meters").Meters(mesh.world, device)
    step = _first("megatron.train.step.train_step", "megatron.train.step").TrainStep(engine, meters)
    # The first edition's takes whether this rank wants to stop.
    takes = signature(step.__call__).parameters
    wishes = () if "wishes" in takes else (False,)
    samples = (0,) if "consumed_samples" in takes else ()  # earlier editions seeded dropout by their number
    batches = [_batch(lengths, seed) for seed in range(micro_batches)]

    def timed() -> tuple[float, float]:
        began_s = time.perf_counter()
        step(batches, LEARNING_RATE, *samples, *wishes)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began_s, meters.read().loss

    return timed


def _first(*names: str) -> Any:
    """The first of the modules that the checkout has."""
    for name in names:
        try:
            return import_module(name)
        except ModuleNotFoundError:
            continue
    raise SystemExit(f"{sys.path[0]} has none of {', '.join(names)}; give a checkout of this project")


def _batch(lengths: Sequence[int], seed: int) -> Any:
    """A full row with every seventh token a target, and the room beside it that a run leaves."""
    module, rows = (_first(*names) for names in (("megatron.data.batches.batch", "megatron.data.batch"),
                                                 ("megatron.data.rows.packed", "megatron.data.packed")))
    tokens = np.random.default_rng(seed).integers(6, 31, sum(lengths))
    targets = np.arange(1, len(tokens), 7)
    row = rows.Row(tokens, np.array(lengths), targets, tokens[targets])
    if not hasattr(module, "BatchShape"):  # the first edition
        return module.collate([row], len(tokens))
    return module.collate([row], module.BatchShape(len(tokens), num_proteins=len(lengths) + len(lengths) // 4 + 8,
                                                   num_targets=len(targets) + 2, max_length=max(lengths)))


def main() -> None:
    """Answer each line of the input."""
    checkout, micro_batches, lengths, *flags = sys.argv[1:]
    step = build_step(checkout, int(micro_batches), [int(length) for length in lengths.split(",")], flags)
    for _ in sys.stdin:
        print(*step(), flush=True)


if __name__ == "__main__":
    main()
