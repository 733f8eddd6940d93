"""Takes training steps of any checkout of this project, back to its first edition (commit 2ee3fa2).

train_step.py starts it as a program with the arguments CHECKOUT MICRO_BATCHES LENGTH,… FLAG …. It takes a step for each
line of its input and prints the step's seconds and loss. It imports nothing of this checkout, only of CHECKOUT.
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
    """A function that takes a training step of a checkout's program, and returns its seconds and its loss.

    `lengths`: tokens of the proteins in each of the `micro_batches` rows; `flags`: of the program.
    """
    sys.path.insert(0, checkout)
    config, _ = _first("megatron.config.command_line", "megatron.flags").parse(flags)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mesh = import_module("megatron.parallel.mesh").Mesh(device=device)
    engine = _first("megatron.train.step.engine", "megatron.train.engine").build_engine(config, mesh, VOCABULARY)
    meters = _first("megatron.train.step.meters", "megatron.train.meters").Meters(mesh.world, device)
    step = _first("megatron.train.step.train_step", "megatron.train.step").TrainStep(engine, meters)
    # In the first edition, a step has an argument that says whether this rank wants to stop.
    takes = signature(step.__call__).parameters
    wishes = () if "wishes" in takes else (False,)
    samples = (0,) if "consumed_samples" in takes else ()  # earlier editions derive dropout's seed from it
    batches = [_batch(lengths, seed) for seed in range(micro_batches)]

    def timed() -> tuple[float, float]:
        began_s = time.perf_counter()
        step(batches, LEARNING_RATE, *samples, *wishes)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began_s, meters.read().loss

    return timed


def _first(*names: str) -> Any:
    """The first of these modules that the checkout has."""
    for name in names:
        try:
            return import_module(name)
        except ModuleNotFoundError:
            continue
    raise SystemExit(f"{sys.path[0]} has none of {', '.join(names)}; give a checkout of this project")


def _batch(lengths: Sequence[int], seed: int) -> Any:
    """A batch of a full row with every seventh token a target, padded as in a run."""
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
    """Take a step for each line of the input."""
    checkout, micro_batches, lengths, *flags = sys.argv[1:]
    step = build_step(checkout, int(micro_batches), [int(length) for length in lengths.split(",")], flags)
    for _ in sys.stdin:
        print(*step(), flush=True)


if __name__ == "__main__":
    main()
