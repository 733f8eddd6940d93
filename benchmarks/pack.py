"""Measures packing into rows: time, memory and fill: `python benchmarks/pack.py [--proteins 35000000] [--repeats 5]`.

Proteins with Pfam-like lengths (log-normal, median 141, mean 164 residues) are packed for one shuffled epoch, each time
in a separate process that maps the lengths from a file; the cases alternate. Memory is the peak of the whole process,
including the mapped lengths.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron.data.rows.packing import order_key, pack  # noqa: E402

CASES = [(packing, seq_length) for packing in ("best-fit", "sequential") for seq_length in (2176, 512)]


def main() -> None:
    """Write the lengths, run every case `--repeats` times and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--proteins", type=int, default=35_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        lengths, packing, seq_length = arguments.case
        print(json.dumps(measure(Path(lengths), packing, int(seq_length))))
        return
    with tempfile.TemporaryDirectory() as folder:
        lengths_path = Path(folder) / "lengths.npy"
        draws = np.random.default_rng(0).lognormal(4.95, 0.55, arguments.proteins)
        np.save(lengths_path, np.clip(draws, 8, 2500).astype(np.int32))
        del draws
        results: dict[tuple[str, int], list[dict[str, float]]] = {case: [] for case in CASES}
        for _ in range(arguments.repeats):
            for case in CASES:
                command = [sys.executable, __file__, "--case", str(lengths_path), *map(str, case)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                results[case].append(json.loads(output))
    print_table(results, arguments.proteins)


def measure(lengths_path: Path, packing: str, seq_length: int) -> dict[str, float]:
    """Pack one shuffled epoch; returns elapsed and processor seconds, peak memory, rows and the fill as a share."""
    lengths = np.load(lengths_path, mmap_mode="r").view(np.ndarray)
    elapsed_s, processor_s = -time.perf_counter(), -time.process_time()
    rows = pack(lengths, seq_length, packing, key=order_key(1234, 0))
    elapsed_s, processor_s = elapsed_s + time.perf_counter(), processor_s + time.process_time()
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    tokens = int(np.minimum(lengths, seq_length - 1).sum(dtype=np.int64)) + len(lengths)
    return {"elapsed_s": elapsed_s, "processor_s": processor_s, "peak_mb": peak_mb, "rows": len(rows),
            "fill": tokens / (len(rows) * seq_length)}


def print_table(results: dict[tuple[str, int], list[dict[str, float]]], num_proteins: int) -> None:
    """Print a line for each case: median and range of the elapsed time, and medians of the rest."""
    print(f"{num_proteins:,} proteins, one shuffled epoch\n")
    print("| packing | row | elapsed s: median (range) | processor s | peak MB | rows | % full |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (packing, seq_length), runs in results.items():
        times = [run["elapsed_s"] for run in runs]
        middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        print(f"| {packing} | {seq_length} | {middle['elapsed_s']:.2f} ({min(times):.2f}–{max(times):.2f}) | "
              f"{middle['processor_s']:.2f} | {middle['peak_mb']:.0f} | {middle['rows']:,.0f} | "
              f"{100 * middle['fill']:.2f} |")


if __name__ == "__main__":
    main()
