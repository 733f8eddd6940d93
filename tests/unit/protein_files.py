"""Writes the same proteins in each file format, and preprocesses a file."""

import io
import json
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron.data.corpus.indexed import open_indexed
from megatron.data.corpus.vocab import Vocab
from megatron.data.preprocess.flags import PreprocessConfig
from megatron.data.preprocess.run import preprocess
from megatron.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
TITIN = "".join(random.Random(1).choices("ACDEFGHIKLMNPQRSTVWY", k=35_213))
PROTEINS = ["MKVLAAGIV", "M", TITIN, "ACDEFGHIKLMNPQRSTVWYX", "MKVLAAGIV", "BZUOJ"]


def as_json(proteins):
    return "".join(json.dumps({"id": 3, "text": protein}) + "\n" for protein in proteins).encode()


def as_fasta(proteins):
    lines = [f">sp|P{n}|é some [protein] > of man\n" + "".join(p[i:i + 60] + "\n" for i in range(0, len(p), 60))
             for n, p in enumerate(proteins)]
    return "".join(lines).encode()


def as_strings(proteins):
    return "".join(protein + "\n" for protein in proteins).encode()


def as_parquet(proteins):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    pq.write_table(pa.table({"id": list(range(len(proteins))), "text": proteins}), file)
    return file.getvalue()


def write_lmdb(path: Path, values: list[bytes | None], num_examples: object) -> Path:
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(path), map_size=1 << 26) as environment, environment.begin(write=True) as transaction:
        for index, value in enumerate(values):
            if value is not None:
                transaction.put(str(index).encode(), value)
        if num_examples is not None:
            transaction.put(b"num_examples", pickle.dumps(num_examples))
    return path


def as_tape(proteins):
    return [pickle.dumps({"primary": p, "protein_length": np.int64(len(p)), "family": 3, "id": str(n)}, protocol=n % 5)
            for n, p in enumerate(proteins)]


def as_csv(proteins):
    return b"id,text\n" + "".join(f'"P{n}, a ""fine"" one",{protein}\n' for n, protein in enumerate(proteins)).encode()


def as_tsv(proteins):
    return b"id\ttext\n" + "".join(f'P{n} 5"-end\t{protein}\n' for n, protein in enumerate(proteins)).encode()


def as_arrow_stream(proteins):
    return _as_arrow(proteins, "new_stream")


def as_arrow_file(proteins):
    return _as_arrow(proteins, "new_file")


def _as_arrow(proteins, writer):
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"id": list(range(len(proteins))), "text": proteins})
    file = io.BytesIO()
    with getattr(pa.ipc, writer)(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=4)
    return file.getvalue()


TEXTS: dict[str, Callable[..., bytes]] = {"json": as_json, "fasta": as_fasta, "strings": as_strings, "csv": as_csv,
                                          "tsv": as_tsv}
BINARIES: dict[str, Callable[..., bytes]] = {"parquet": as_parquet, "arrow stream": as_arrow_stream,
                                             "arrow file": as_arrow_file}
KINDS = TEXTS | BINARIES


def ids_of(tmp_path: Path, *sources: Path | str, **options) -> bytes:
    """The bytes of .bin and .idx that preprocessing writes; asserts that it leaves no partial file."""
    prefix = tmp_path / "out"
    given = {"overwrite": True} | options
    preprocess(PreprocessConfig(input=tuple(map(str, sources)), output_prefix=str(prefix), **given))
    assert not list(tmp_path.glob("*.partial"))
    return Path(f"{prefix}_text_document.bin").read_bytes() + Path(f"{prefix}_text_document.idx").read_bytes()


def read_or_refused(tmp_path: Path, source: Path, **options) -> None:
    """Asserts that a file is refused in one line or read whole.

    Read whole: each record is kept or counted as dropped, and all ids are those of residues or unknown ones.
    """
    try:
        ids_of(tmp_path, source, **options)
    except DataError as error:
        assert "\n" not in str(error)
        return
    counts = json.loads((tmp_path / "out.stats.json").read_text())["outputs"]["text"]
    indexed, vocab = open_indexed(str(tmp_path / "out_text_document")), Vocab.from_file()
    assert counts["records"] == counts["kept"] + sum(counts["dropped"].values())
    assert indexed.num_documents == counts["kept"]
    assert {*np.unique(indexed.tokens).tolist()} <= {*vocab.residue_ids, vocab.unk_id}


def damaged(tmp_path: Path, data: bytes, **options) -> str:
    """The message, one line, with which preprocessing refuses a file of these bytes."""
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(DataError) as caught:
        ids_of(tmp_path, tmp_path / "bad", **options)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "bad"))
    assert "\n" not in message
    return message


def write_json(path: Path, texts: list[str]) -> Path:
    """Write the texts as loose JSON with numbered ids; returns the path."""
    path.write_text("".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)))
    return path


def run(tmp_path: Path, source: Path | str, **options) -> dict:
    """Preprocess `source` to `tmp_path`/out, overwriting what is there; returns the statistics."""
    given = {"overwrite": True} | options
    return preprocess(PreprocessConfig(input=(str(source),), output_prefix=str(tmp_path / "out"), **given))


def outputs(folder: Path) -> dict[str, bytes]:
    """The bytes of the files that preprocessing wrote to the folder, by name, without the statistics."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("out*")) if "stats" not in path.name}


def documents(prefix: Path) -> list[list[int]]:
    """The ids of each document."""
    dataset = open_indexed(str(prefix))
    return [[int(i) for s in range(start, stop) for i in dataset[s]]
            for start, stop in zip(dataset.doc_idx, dataset.doc_idx[1:], strict=False)]


def tool(*arguments: str | Path, cwd: Path, **options) -> subprocess.CompletedProcess:
    """Run tools/preprocess_data.py with these arguments in its own process; returns the finished process."""
    return subprocess.run([sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *map(str, arguments)], cwd=cwd,
                          capture_output=True, text=True, timeout=60, **options)
