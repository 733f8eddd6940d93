"""Measures preprocessing's speed and peak memory: `python benchmarks/preprocess.py [--proteins 1000000] [--repeats 3]`.

Random proteins with realistic lengths (log-normal around Swiss-Prot's median of 319) and letters are written in each
form. Then `tools/preprocess_data.py` runs on them in a separate process, as a user would run it; the forms alternate.
"""

import argparse
import gzip
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
LETTERS = "LASEGVKIRDTPNQFYHMCW"
COUNTS = (152, 121, 113, 105, 105, 103, 93, 90, 85, 83, 83, 77, 66, 62, 61, 46, 35, 35, 24, 17)
MEDIAN_LENGTH, SPREAD = 319, 0.68
FORMS = ("json", "spaced json", "fasta", "fasta.gz", "strings")


@dataclass(frozen=True)
class PreprocessCase:
    """A form of input and a number of workers."""

    form: str
    num_workers: int


def main() -> None:
    """Write the inputs, run every case `--repeats` times and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--proteins", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        inputs = {form: Path(folder) / form.replace(" ", "_") for form in arguments.forms}
        num_residues = write_inputs(inputs, arguments.proteins)
        cases = [PreprocessCase(form, workers) for form in arguments.forms for workers in arguments.workers]
        times: dict[PreprocessCase, list[float]] = {case: [] for case in cases}
        peaks: dict[PreprocessCase, float] = {}
        for _ in range(arguments.repeats):
            for case in cases:
                elapsed_s, peak_mib = run(inputs[case.form], Path(folder) / "out", case.num_workers)
                times[case].append(elapsed_s)
                peaks[case] = max(peaks.get(case, 0), peak_mib)
        sizes = {form: path.stat().st_size for form, path in inputs.items()}
    print(f"{arguments.proteins:,} proteins, {num_residues:,} residues, {os.cpu_count()} cores, "
          f"{arguments.repeats} runs each, start of Python included")
    print("| form | workers | M residues/s, median (least to most) | input MB/s | peak memory of a process, MiB |")
    print("| --- | --- | --- | --- | --- |")
    for case in cases:
        speeds = sorted(num_residues / elapsed_s / 1e6 for elapsed_s in times[case])
        spread = f"{statistics.median(speeds):.1f} ({speeds[0]:.1f} to {speeds[-1]:.1f})"
        megabytes_per_s = sizes[case.form] / statistics.median(times[case]) / 1e6
        print(f"| {case.form} | {case.num_workers} | {spread} | {megabytes_per_s:.0f} | {peaks[case]:.0f} |")


def proteins(count: int) -> Iterator[bytes]:
    """The residues of `count` random proteins, the same each time."""
    generator = np.random.default_rng(1)
    weights = np.array(COUNTS) / sum(COUNTS)
    pool = generator.choice(np.frombuffer(LETTERS.encode(), np.uint8), size=1 << 22, p=weights).tobytes()
    for start in range(0, count, 10_000):
        lengths = generator.lognormal(np.log(MEDIAN_LENGTH), SPREAD, min(10_000, count - start)).clip(2, 35_000)
        starts = generator.integers(0, len(pool) - 35_000, len(lengths))
        for length, first in zip(lengths.astype(int).tolist(), starts.tolist(), strict=True):
            yield pool[first:first + length]


def write_inputs(inputs: dict[str, Path], count: int) -> int:
    """Write each form; returns the number of residues."""
    num_residues = 0
    files = {form: gzip.open(path, "wb", compresslevel=1) if form.endswith("gz") else open(path, "wb")  # noqa: SIM115
             for form, path in inputs.items()}
    for number, residues in enumerate(proteins(count)):
        num_residues += len(residues)
        for form, file in files.items():
            file.write(_record(form, number, residues))
    for file in files.values():
        file.close()
    return num_residues


def run(source: Path, prefix: Path, num_workers: int) -> tuple[float, float]:
    """Run the tool once; returns seconds, and the largest peak memory of any of its processes in MiB."""
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(source),
               "--output-prefix", str(prefix), "--workers", str(num_workers), "--overwrite"]
    # In a process of its own, so that the peak memory of children is that of this run only.
    script = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); " \
             "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script, *command], check=True, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL)
    return time.perf_counter() - begun, int(done.stdout) / 1024


def _record(form: str, number: int, residues: bytes) -> bytes:
    if form == "json":
        return b'{"text": "%s"}\n' % residues
    if form == "spaced json":
        return b'{"text": "%s"}\n' % b" ".join(residues[i:i + 1] for i in range(len(residues)))
    if form == "strings":
        return residues + b"\n"
    lines = b"".join(residues[i:i + 60] + b"\n" for i in range(0, len(residues), 60))
    return b">sp|P%07d|PROTEIN\n%s" % (number, lines)


if __name__ == "__main__":
    main()
