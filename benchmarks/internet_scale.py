"""Starts training on a corpus of a billion proteins: `python benchmarks/internet_scale.py FOLDER [--proteins N]`.

The corpus has a complete .idx, with lengths like UniRef50's (log-normal, median 270, mean 330 residues), but its .bin
is a sparse file of the right size. It takes 20 bytes of disk for each protein, and 8 more while it is written. The
first process packs an epoch and writes the row index, as the first rank of a host does. Then as many processes as a
host has ranks start together, map the index and read their first rows. Prints seconds and peak private memory (RssAnon)
of each; mapped memory is shared and can be reclaimed.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.own_memory import OwnMemory  # noqa: E402
from megatron.config.command_line import parse  # noqa: E402
from megatron.data.corpus.indexed_writer import IndexedWriter  # noqa: E402
from megatron.data.corpus.vocab import Vocab  # noqa: E402
from megatron.data.rows.dataset import build_datasets  # noqa: E402

VOCAB = Vocab.from_file("iupac")
CHUNK_PROTEINS = 1 << 22


def write_corpus(prefix: Path, num_proteins: int) -> int:
    """Write the corpus if it does not exist; returns its number of residues."""
    rng, num_residues = np.random.default_rng(0), 0
    if not prefix.with_suffix(".idx").exists():
        with IndexedWriter(prefix) as writer:
            for start in range(0, num_proteins, CHUNK_PROTEINS):
                count = min(CHUNK_PROTEINS, num_proteins - start)
                lengths = np.clip(rng.lognormal(5.6, 0.65, count), 20, 35_213).astype(np.int32)
                num_residues += int(lengths.sum(dtype=np.int64))
                writer.add(np.zeros(0, np.uint16), lengths, np.ones(count, np.int32))
        os.truncate(prefix.with_suffix(".bin"), 2 * num_residues)  # all ids are 0; the statistics name the vocabulary
        stats = {"vocabulary": {"tokens": VOCAB.tokens},
                 "outputs": {"text": {"files": [{"path": prefix.with_suffix(".bin").name}]}}}
        prefix.with_suffix(".stats.json").write_text(json.dumps(stats))
    return prefix.with_suffix(".bin").stat().st_size // 2


def start_rank(rank: int, arguments: tuple[str, ...]) -> tuple[float, float, float]:
    """Seconds to build the datasets, seconds to read 32 rows of this rank, and peak private memory in GiB."""
    config = parse(arguments)[0]
    with OwnMemory() as memory:
        began_s = time.perf_counter()
        train = build_datasets(config.data, VOCAB, config.training.seed).train
        built_s = time.perf_counter()
        for sample in range(32 * rank, 32 * rank + 32):
            train[sample]
        read_s = time.perf_counter()
    return built_s - began_s, read_s - built_s, memory.most_gb * 1e9 / 2**30


def main() -> None:
    """Write the corpus, start the processes and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--proteins", type=int, default=1_000_000_000)
    parser.add_argument("--ranks", type=int, default=8, help="that start together, as those of a host")
    given = parser.parse_args()
    prefix = given.folder / f"sparse_{given.proteins}_text_document"
    began_s = time.perf_counter()
    num_residues = write_corpus(prefix, given.proteins)
    print(f"{given.proteins:,} proteins, {num_residues:,} residues: .idx {prefix.with_suffix('.idx').stat().st_size:,} "
          f"bytes, .bin {2 * num_residues:,} (sparse), written in {time.perf_counter() - began_s:.0f} s\n", flush=True)
    arguments = ("--preset", "demo", "--data-path", str(prefix), "--seq-length", "1024", "--split", "999,1,0")
    print("| process | datasets, s | 32 rows, s | memory of its own at the peak, GiB |\n| --- | --- | --- | --- |")
    context = multiprocessing.get_context("spawn")  # a forked process would inherit this one's memory
    with context.Pool(1) as pool:
        tell("first of all: packs, and writes the row index", [pool.apply(start_rank, (0, arguments))])
    with context.Pool(given.ranks) as pool:
        tell(f"each of {given.ranks} at once, from the row index",
             pool.starmap(start_rank, [(rank, arguments) for rank in range(given.ranks)], chunksize=1))
    files = sorted((given.folder / "row_index").glob(f"{prefix.name}*.rows"))
    print(f"\nrow index: {sum(file.stat().st_size for file in files):,} bytes in {len(files)} files")


def tell(name: str, measured: list[tuple[float, float, float]]) -> None:
    """Print a row with the maximum over some processes."""
    built_s, read_s, gib = (max(column) for column in zip(*measured, strict=True))
    print(f"| {name} | {built_s:.1f} | {read_s:.2f} | {gib:.2f} |", flush=True)


if __name__ == "__main__":
    main()
