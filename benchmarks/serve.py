"""Measures how fast batches are prepared: `python benchmarks/serve.py [--proteins 300000] [--seconds 3] [--repeats 5]`.

Random proteins with Pfam-like lengths are written as an indexed dataset. Worker processes prepare batches as in
training, masked and collated, and the main process only takes them. The cases alternate.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron.config import DataConfig  # noqa: E402
from megatron.data.batches.batch import batch_shape  # noqa: E402
from megatron.data.batches.loader import batches  # noqa: E402
from megatron.data.corpus.indexed_writer import IndexedWriter  # noqa: E402
from megatron.data.corpus.vocab import Vocab  # noqa: E402
from megatron.data.rows.dataset import Dataset, build_datasets  # noqa: E402


@dataclass(frozen=True)
class ServingCase:
    """A case: row length, rows in a micro-batch, workers and mean length of masked spans."""

    seq_length: int
    micro_batch_size: int
    num_workers: int
    span_length: float = 1.0


CASES = tuple(ServingCase(*case) for case in ((2176, 1, 2), (2176, 8, 2), (512, 4, 2), (512, 16, 2), (2176, 8, 2, 3.0),
                                              (2176, 8, 0)))


def main() -> None:
    """Write the dataset, measure every case `--repeats` times and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--proteins", type=int, default=300_000)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    vocab = Vocab.from_file()
    with tempfile.TemporaryDirectory() as folder:
        prefix = str(Path(folder) / "proteins")
        write_proteins(prefix, arguments.proteins, vocab)
        datasets = {case: build_datasets(DataConfig(data_path=(prefix,), seq_length=case.seq_length, split="1",
                                                    mask_span_length=case.span_length), vocab, 1).train
                    for case in CASES}
        results: dict[ServingCase, list[tuple[float, float]]] = {case: [] for case in CASES}
        for _ in range(arguments.repeats):
            for case in CASES:
                results[case].append(serve(datasets[case], case, arguments.seconds))
    print("| row | rows a batch | workers | mean span | M residues/s: median (range) | batches/s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for case, runs in results.items():
        rates = [residues / 1e6 for residues, _ in runs]
        print(f"| {case.seq_length} | {case.micro_batch_size} | {case.num_workers} | {case.span_length:g} | "
              f"{statistics.median(rates):.2f} ({min(rates):.2f}–{max(rates):.2f}) | "
              f"{statistics.median(count for _, count in runs):.0f} |")


def write_proteins(prefix: str, num_proteins: int, vocab: Vocab) -> None:
    """Write an indexed dataset of random proteins with Pfam-like lengths."""
    rng = np.random.default_rng(0)
    sizes = np.clip(rng.lognormal(4.95, 0.55, num_proteins), 8, 2500).astype(np.int32)
    with IndexedWriter(prefix) as writer:
        writer.add(rng.choice(vocab.residue_ids, sizes.sum()), sizes, np.ones(num_proteins, np.int32))


def serve(dataset: Dataset, case: ServingCase, seconds: float) -> tuple[float, float]:
    """Residues and batches a second, counted after 20 batches, which may be prepared while the workers start."""
    shape = batch_shape([dataset], case.micro_batch_size)
    loader = batches(dataset, shape, start_sample=0, micro_batch_size=case.micro_batch_size, data_rank=0, data_size=1,
                     num_workers=case.num_workers, pin=False)
    for _ in range(20):
        next(loader)
    num_residues = num_batches = 0
    start = time.perf_counter()
    while (elapsed_s := time.perf_counter() - start) < seconds:
        num_residues += next(loader).num_residues
        num_batches += 1
    loader.close()
    return num_residues / elapsed_s, num_batches / elapsed_s


if __name__ == "__main__":
    main()
