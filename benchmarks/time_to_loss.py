"""Measures how soon one recipe reaches the loss of another: `python benchmarks/time_to_loss.py PREFIX --rows 5600 640`.

PREFIX and the arms are those of recipes.py. The first of --arms is trained on the first number of --rows, the second on
the second, one run at a time, with each seed; nothing else should run on the machine. Both are evaluated at the end on
all validation proteins. Seconds are of training, without loading, evaluating and saving; processor seconds are of all
threads and of the whole program. Runs are recorded in recipes.jsonl, and not repeated on a machine with as many cores.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import recipes  # noqa: E402

HEADS = ("size", "arm", "rows", "steps", "seed", "validation loss", "seconds", "of the processor")


def record_of(size: str, arm: str, rows: int, seed: int, prefix: str) -> dict:
    """The record of a run on as many cores as this machine has: a known one, else that of a run made now."""
    asked = {"size": size, "arm": arm, "rows": rows, "seed": seed, "cores": len(os.sched_getaffinity(0))}
    for record in recipes.known():
        if all(record.get(key) == value for key, value in asked.items()):
            return record
    record = recipes.trained(prefix, size, rows, arm, seed, "auto")
    recipes.keep(record)
    return record


def line_of(record: dict) -> str:
    """The row of the table for a record."""
    return (f"| {record['size']} | {record['arm']} | {record['rows']:,} | {record['steps']:,} | {record['seed']} | "
            f"{record['loss']:.4f} | {record['training_s']:,.0f} | {record['processor_s']:,.0f} |")


def compared(before: Sequence[dict], after: Sequence[dict]) -> str:
    """Lines that compare the runs of two arms, paired by seed: losses, seconds, and how many times fewer seconds."""
    pairs = list(zip(before, after, strict=True))
    num_below = sum(two["loss"] < one["loss"] for one, two in pairs)
    lines = [f"losses: {' and '.join(_range([run['loss'] for run in runs], '.4f') for runs in (before, after))}; "
             f"the second is below the first with {num_below} of {len(pairs)} seeds"]
    for name, key in (("seconds", "training_s"), ("seconds of the processor", "processor_s")):
        times = " and ".join(_range([run[key] for run in runs], ",.0f") for runs in (before, after))
        lines.append(f"{name}: {times}, {_range([one[key] / two[key] for one, two in pairs], '.2f')} times fewer")
    return "\n".join(lines)


def _range(values: Sequence[float], form: str) -> str:
    """The median and the range as text."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main() -> None:
    """Make the missing runs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", help="prefix of proteins_demo's .bin and .idx")
    parser.add_argument("--size", choices=recipes.SIZES, default="4x128")
    parser.add_argument("--rows", type=int, nargs=2, default=[5600, 640], help="of 1,024 tokens, in all")
    parser.add_argument("--arms", nargs=2, choices=recipes.ARMS,
                        default=["adamw, 2 rows, lr 7e-4, beta2 0.95", "recipe, mask 0.3"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    given = parser.parse_args()
    print(f"| {' | '.join(HEADS)} |\n{'| --- ' * len(HEADS)}|")
    runs: tuple[list[dict], list[dict]] = ([], [])
    for seed in given.seeds:
        for of_arm, arm, rows in zip(runs, given.arms, given.rows, strict=True):
            of_arm.append(record_of(given.size, arm, rows, seed, given.prefix))
            print(line_of(of_arm[-1]), flush=True)
    print(f"\n{compared(*runs)}")


if __name__ == "__main__":
    main()
