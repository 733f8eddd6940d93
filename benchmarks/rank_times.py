"""Measures the cost of timing each rank's waits: `python -m megatron.parallel.launch --standalone --nproc-per-node 2 \\
benchmarks/rank_times.py [--pairs 200] [FLAG of pretrain_tape.py …]`.

Takes pairs of steps of a tiny model, one with the waits timed and one without, in alternating order, and prints the
median difference within a pair.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.train_step import processor  # noqa: E402
from benchmarks.training import SMALL, full_rows  # noqa: E402
from megatron.config.command_line import parse  # noqa: E402
from megatron.parallel.launch.environment import launched  # noqa: E402
from megatron.parallel.launch.leaving import leave  # noqa: E402
from megatron.parallel.mesh import open_mesh  # noqa: E402
from megatron.plan.rank import padded_vocab_size  # noqa: E402
from megatron.train.step.engine import build_engine  # noqa: E402
from megatron.train.step.meters import Meters  # noqa: E402
from megatron.train.step.train_step import TrainStep  # noqa: E402


def main() -> int:
    """Measure, and print one line on the first rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200)
    options, flags = parser.parse_known_args()
    config, _ = parse(["--preset", "tape", *SMALL, "--no-bf16", "--micro-batch-size", "1", *flags])
    with open_mesh(config.parallel, launched()) as mesh:
        assert mesh.waits is not None, "several ranks are needed"
        meters = Meters(mesh.world, mesh.device, mesh.waits)
        step = TrainStep(build_engine(config, mesh, padded_vocab_size(config), mask_id=5), meters)
        batch = full_rows(config, config.training.micro_batch_size)
        taken_ms: dict[bool, list[float]] = {False: [], True: []}
        for number in range(2 * options.pairs + 10):
            mesh.waits.is_counting = is_counting = number % 2 == number // 2 % 2  # each comes first in turns
            began_s = time.perf_counter()
            step([batch], 1e-5, (False, False))
            if number >= 10:
                taken_ms[is_counting].append(1000 * (time.perf_counter() - began_s))
        if mesh.world.rank == 0:
            without, counted = (statistics.median(taken_ms[which]) for which in (False, True))
            apart = statistics.median(b - a for a, b in zip(taken_ms[False], taken_ms[True], strict=True))
            print(f"{processor()}, {mesh.world.size} ranks, {options.pairs} pairs of steps: {without:.2f} ms without, "
                  f"{counted:.2f} ms with; in a pair {apart:+.3f} ms, {100 * apart / without:+.2f} %")
    return 0


if __name__ == "__main__":
    leave(main())
