"""Measures the cost of a residue by protein length, and the memory of a large model: `python benchmarks/scaling.py`.

First takes steps of 4 layers x 256 on a row of some 2,170 tokens, divided into proteins of equal length, in fp32 and
bf16; the cases alternate. Prints microseconds for each residue, medians with quartiles. Then prints the peak memory of
a process that takes two steps of 16 layers x 1,024 in fp32 on a row of 2,176 tokens, without and with recomputation.
"""

import argparse
import resource
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.checkout_step import build_step  # noqa: E402
from benchmarks.proteins import LENGTHS  # noqa: E402
from benchmarks.train_step import WARM_UP, flags_of, processor, spread  # noqa: E402

ROW = 2170
PROTEINS = [1, 3, 11, 43, 100]  # how many in the row: of 2,170 to 22 tokens each


def cost_of_lengths(repeats: int) -> None:
    """Print the table of the cost of a residue by protein length."""
    print("| proteins a row | tokens each | fp32, µs a residue | bf16, µs a residue |\n| --- | --- | --- | --- |")
    cases = [(number, precision) for number in PROTEINS for precision in ("", "--bf16")]
    steps = {case: build_step(str(ROOT), 1, [ROW // case[0]] * case[0], flags_of(4, 256, case[1])) for case in cases}
    times: dict[tuple[int, str], list[float]] = {case: [] for case in cases}
    for _ in range(WARM_UP + repeats):
        for case, step in steps.items():
            times[case].append(step()[0])
    for number in PROTEINS:
        residues = number * (ROW // number - 1)
        cells = [spread([1e6 * elapsed_s / residues for elapsed_s in times[number, precision][WARM_UP:]], ".0f")
                 for precision in ("", "--bf16")]
        print(f"| {number} | {ROW // number} | {' | '.join(cells)} |", flush=True)


def memory_of_a_step(*flags: str) -> None:
    """Take two steps of the large model in this process; print its peak memory in GB and the seconds of a step."""
    step = build_step(str(ROOT), 1, LENGTHS, [*flags_of(16, 1024, ""), *flags])
    elapsed_s = statistics.mean(step()[0] for _ in range(2))
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} | {elapsed_s:.1f}")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only-memory", nargs="*", metavar="FLAG", help=argparse.SUPPRESS)
    arguments, flags = parser.parse_known_args()
    if arguments.only_memory is not None:
        memory_of_a_step(*flags)
        return
    print(f"{processor()}\n")
    cost_of_lengths(arguments.repeats)
    print("\n| 16 x 1,024, fp32 | GB at most | seconds a step |\n| --- | --- | --- |")
    for name, extra in (("as it is", []), ("recomputed", ["--checkpoint-activations"])):
        said = subprocess.run([sys.executable, __file__, "--only-memory", *extra], capture_output=True, text=True,
                              check=True).stdout.strip()
        print(f"| {name} | {said} |", flush=True)


if __name__ == "__main__":
    main()
