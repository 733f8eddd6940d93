"""How soon a recipe comes to the best loss of another: `python benchmarks/time_to_loss.py PREFIX --rows 5600 700`.

PREFIX as for recipes.py, whose arms these are. The first of --arms is trained on the first of --rows, the second on the
second, with each seed in turn, one after the other, with nothing else on the machine; both are evaluated at their ends
on all validation proteins. Seconds are those of training, without loading, evaluating and saving.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.recipes import ARMS, SIZES, trained  # noqa: E402


def main() -> None:
    """Run and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", help="prefix of proteins_demo's .bin and .idx")
    parser.add_argument("--size", choices=SIZES, default="4x128")
    parser.add_argument("--rows", type=int, nargs=2, default=[5600, 700], help="of 1,024 tokens, in all")
    parser.add_argument("--arms", nargs=2, choices=ARMS, default=["adamw, 2 rows, lr 7e-4, beta2 0.95", "recipe"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    given = parser.parse_args()
    heads = ("size", "arm", "rows", "steps", "seed", "validation loss", "seconds")
    print(f"| {' | '.join(heads)} |\n{'| --- ' * len(heads)}|")
    before, after = list[float](), list[float]()
    for seed in given.seeds:
        for arm, rows, seconds in zip(given.arms, given.rows, (before, after), strict=True):
            record = trained(given.prefix, given.size, rows, arm, seed, "auto")
            seconds.append(record["training_s"])
            print(f"| {given.size} | {arm} | {rows:,} | {record['steps']:,} | {seed} | {record['loss']:.4f} | "
                  f"{record['training_s']:.0f} |", flush=True)
    ratios = [slow / fast for slow, fast in zip(before, after, strict=True)]
    print(f"\nseconds: {_range(before, '.0f')} and {_range(after, '.0f')}: {_range(ratios, '.2f')} times as many")


def _range(values: Sequence[float], form: str) -> str:
    """The median, the least and the most."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


if __name__ == "__main__":
    main()
