"""Checks that Megatron-LM's IndexedDataset reads our files, and that we read its files, id by id.

    pip download megatron-core==0.16.1 --no-deps -d wheel && python -m zipfile -e wheel/*.whl unpacked
    python benchmarks/megatron_round_trip.py unpacked

The wheel's package has the same name as ours, so each runs in its own process.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron.data.corpus.indexed import open_indexed  # noqa: E402
from megatron.data.corpus.indexed_writer import IndexedWriter  # noqa: E402

NUM_DOCUMENTS = 2000
DTYPES = ("uint8", "int16", "int32", "int64", "uint16")
THEIRS = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy, torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
folder, dtypes = sys.argv[2], sys.argv[3:]
ours = IndexedDataset(folder + "/ours", mmap=True)
sequences = [ours[i] for i in range(len(ours))]
assert numpy.array_equal(numpy.concatenate(sequences), numpy.load(folder + "/ids.npy"))
assert numpy.array_equal(ours.sequence_lengths, numpy.load(folder + "/sizes.npy"))
documents = ours.document_indices
assert numpy.array_equal(documents, numpy.load(folder + "/documents.npy"))
for dtype in dtypes:
    builder = IndexedDatasetBuilder(folder + f"/{dtype}.bin", dtype=getattr(numpy, dtype))
    for first, last in zip(documents, documents[1:]):
        for sequence in sequences[first:last]:
            builder.add_item(torch.from_numpy(sequence.astype(numpy.int64)))
        builder.end_document()
    builder.finalize(folder + f"/{dtype}.idx")
"""


def main() -> None:
    """Write files, have Megatron-LM read and rewrite them, read the result, and print the outcome."""
    generator = np.random.default_rng(0)
    num_sequences = generator.integers(0, 3, NUM_DOCUMENTS).astype(np.int32)
    sizes = generator.integers(1, 500, num_sequences.sum()).astype(np.int32)
    ids = generator.integers(6, 31, sizes.sum()).astype(np.uint16)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with IndexedWriter(folder / "ours") as writer:
            writer.add(ids, sizes, num_sequences)
        dataset = open_indexed(str(folder / "ours"))
        for file, array in (("ids", ids), ("sizes", sizes), ("documents", dataset.doc_idx)):
            np.save(folder / f"{file}.npy", array)
        unpacked = str(Path(sys.argv[1]).resolve())
        subprocess.run([sys.executable, "-W", "ignore", "-c", THEIRS, unpacked, name, *DTYPES], check=True, cwd=name)
        for dtype in DTYPES:
            theirs = open_indexed(str(folder / dtype))
            assert theirs.dtype == dtype
            assert np.array_equal(theirs.tokens, ids)
            assert np.array_equal(theirs.sizes, sizes)
            assert np.array_equal(theirs.doc_idx, dataset.doc_idx)
        same = all((folder / f"ours.{end}").read_bytes() == (folder / f"uint16.{end}").read_bytes()
                   for end in ("bin", "idx"))
    print(f"{NUM_DOCUMENTS:,} documents, {len(ids):,} ids: Megatron-LM reads ours; we read its {', '.join(DTYPES)}; "
          f"its uint16 files are {'byte for byte ours' if same else 'NOT the same bytes as ours'}")


if __name__ == "__main__":
    main()
