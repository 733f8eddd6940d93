"""Measures the optimizer's share of a training step: `python benchmarks/optimizer_step.py [--repeats 9] [FLAG ...]`.

Takes whole training steps, on the GPU if there is one, of the recipe's model with 4 layers x 256 on four rows of 1,024
positions; FLAGs of pretrain_tape.py change that. The optimizers alternate. Prints medians, and the range of the share.
Without a GPU it measures processor time, which other work on the machine does not affect.
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.checkout_step import build_step  # noqa: E402
from benchmarks.proteins import LENGTHS  # noqa: E402
from megatron.optim.optimizer import Optimizer  # noqa: E402

FLAGS = ("--preset demo --no-bf16 --num-layers 4 --hidden-size 256 --num-attention-heads 4 --seq-length 1024 "
         "--micro-batch-size 4").split()
OPTIMIZERS = "adam", "muon", "normuon"
_STEP = Optimizer.step


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    options, flags = parser.parse_known_args()
    taken_s: list[float] = []

    def timed(optimizer: Optimizer, *arguments: object) -> object:
        began_s = _now_s()
        outcome = _STEP(optimizer, *arguments)  # type: ignore[arg-type]
        taken_s.append(_now_s() - began_s)
        return outcome

    proteins = _proteins(4 * 1024)
    steps = {name: build_step(str(ROOT), 1, proteins, [*FLAGS, *flags, "--optimizer", name]) for name in OPTIMIZERS}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    with patch.object(Optimizer, "step", timed):
        for repeat in range(options.repeats + 2):
            for name, step in steps.items():
                began_s = _now_s()
                step()
                if repeat >= 2:
                    found[name].append((_now_s() - began_s, taken_s[-1]))
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| optimizer | step, ms | of it the optimizer's, ms | share |\n| --- | --- | --- | --- |")
    for name, times in found.items():
        whole, own = (1000 * statistics.median(column) for column in zip(*times, strict=True))
        shares = sorted(mine / all_of_it for all_of_it, mine in times)
        print(f"| {name} | {whole:.0f} | {own:.1f} | {100 * statistics.median(shares):.1f} % "
              f"({100 * shares[0]:.1f}-{100 * shares[-1]:.1f}) |")


def _proteins(num_tokens: int) -> list[int]:
    """Lengths of proteins, as in the other benchmarks, that sum to `num_tokens`."""
    lengths: list[int] = []
    while sum(lengths) < num_tokens:
        lengths.append(min(LENGTHS[len(lengths) % len(LENGTHS)], num_tokens - sum(lengths)))
    return lengths


def _now_s() -> float:
    """The time in seconds, after synchronising with the GPU; without a GPU the processor time of all threads."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
