"""Parquet, Arrow and LMDB: every type of text is read, damage is one clear line, and no reader crashes."""

import gzip
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.data.sources.source import expand
from megatron.errors import DataError
from tests.unit.protein_files import PROTEINS, as_parquet, as_strings, as_tape, damaged, ids_of, write_lmdb

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("expected")
    (folder / "plain.txt").write_bytes(as_strings(PROTEINS))
    return ids_of(folder, folder / "plain.txt")


def test_a_tape_lmdb_gives_the_same_bytes(tmp_path, expected):
    write_lmdb(tmp_path / "pfam.lmdb", as_tape(PROTEINS), len(PROTEINS))
    assert ids_of(tmp_path, tmp_path / "pfam.lmdb") == expected
    file = tmp_path / "pfam.lmdb" / "data.mdb"
    assert ids_of(tmp_path, file) == expected
    packed = gzip.compress(file.read_bytes())
    (tmp_path / "packed").write_bytes(packed)
    assert ids_of(tmp_path, tmp_path / "packed") == expected
    assert "gzip" in damaged(tmp_path, packed[:-100])


def test_damaged_parquet_is_refused(tmp_path):
    whole = as_parquet(PROTEINS)
    for data in (whole[:4], whole[:-20], whole[:100] + whole[200:]):
        assert "Parquet" in damaged(tmp_path, data)
    with pytest.raises(DataError, match="no column 'seq'; it has 'id', 'text'. --json-keys"):
        (tmp_path / "good").write_bytes(whole)
        ids_of(tmp_path, tmp_path / "good", json_keys=("seq",))


def test_a_dictionary_column_is_text(tmp_path, expected):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": pa.array(PROTEINS).dictionary_encode()}), tmp_path / "in.parquet")
    assert ids_of(tmp_path, tmp_path / "in.parquet") == expected
    pq.write_table(pa.table({"text": [1.5]}), tmp_path / "in.parquet")
    with pytest.raises(DataError, match="holds double; expected text"):
        ids_of(tmp_path, tmp_path / "in.parquet")
    pq.write_table(pa.Table.from_arrays([pa.array(["M"])] * 2, names=["text"] * 2), tmp_path / "in.parquet")
    with pytest.raises(DataError, match="2 columns 'text'"):
        ids_of(tmp_path, tmp_path / "in.parquet")


def test_a_damaged_footer_of_parquet_is_refused_without_ending_the_process(tmp_path):
    """Asking for the metadata of a single column would: pyarrow lets an exception of C++ through."""
    whole = as_parquet(["MKV" * n for n in range(30)])
    generator = random.Random(6)
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(3):
            data[-generator.randrange(1, 600)] = generator.randrange(256)
        (tmp_path / "in").write_bytes(data)
        try:
            blocks = list(expand([str(tmp_path / "in")])[0].blocks(("text",)))
            assert sum(len(block.records["text"]) for block in blocks) == 30
        except DataError as error:
            assert "\n" not in str(error)


def test_long_texts_in_parquet_come_in_small_batches(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": ["A" * (1 << 20)] * 8}), tmp_path / "in", use_dictionary=False)
    blocks = list(expand([str(tmp_path / "in")])[0].blocks(("text",)))
    assert sum(len(block.records["text"]) for block in blocks) == 8
    assert max(len(block.records["text"]) for block in blocks) <= 2


def test_nulls_in_parquet_are_bad_records(tmp_path):
    assert "record 2: 'text' is null" in damaged(tmp_path, as_parquet(["MK", None]))


@pytest.mark.parametrize(("values", "num_examples", "message"), [
    ([b"junk"], 1, "record 1: cannot be unpickled"),
    ([pickle.dumps({"primary": "MK"})[:-5]], 1, "record 1: cannot be unpickled"),
    ([pickle.dumps([1])], 1, "record 1: list where a dict belongs"),
    ([pickle.dumps({"sequence": "MK"})], 1, "record 1: no key 'primary'; it has 'sequence'"),
    ([pickle.dumps({"primary": 3})], 1, "'primary' is of type int"),
    ([pickle.dumps({"primary": "M"}), None, pickle.dumps({"primary": "K"})], 3, "it says 3 records and has 3 entries"),
    ([pickle.dumps({"primary": "MK7"})], 1, "record 1, column 3: '7' is not a residue"),
    ([pickle.dumps({"primary": "M"})] * 3, 2, "'num_examples' says 2 records, but there are more"),
    ([], None, "no readable 'num_examples'"),
    ([pickle.dumps({"primary": "MK"})], "many", "it says 'many' records"),
    ([pickle.dumps({"primary": "MK"})], 10**15, "it says 1000000000000000 records"),
])
def test_bad_tape_records_are_named(tmp_path, values, num_examples, message):
    write_lmdb(tmp_path / "bad.lmdb", values, num_examples)
    with pytest.raises(DataError) as caught:
        ids_of(tmp_path, tmp_path / "bad.lmdb")
    assert message in str(caught.value)


@pytest.mark.parametrize("size", [20, 4096, 9000, 30_000])
def test_a_truncated_lmdb_is_refused_though_it_would_crash_its_reader(tmp_path, size):
    write_lmdb(tmp_path / "bad.lmdb", as_tape(PROTEINS * 20), len(PROTEINS) * 20)
    os.truncate(tmp_path / "bad.lmdb" / "data.mdb", size)
    with pytest.raises(DataError, match="bad.lmdb"):
        ids_of(tmp_path, tmp_path / "bad.lmdb")


def test_a_damaged_lmdb_is_read_right_or_refused_in_one_line(tmp_path):
    write_lmdb(tmp_path / "bad.lmdb", as_tape(PROTEINS), len(PROTEINS))
    file = tmp_path / "bad.lmdb" / "data.mdb"
    whole = file.read_bytes()
    generator = random.Random(4)
    for _ in range(3):
        data = bytearray(whole)
        for _ in range(400):
            data[generator.randrange(len(data))] = generator.randrange(256)
        file.write_bytes(data)
        try:
            ids_of(tmp_path, tmp_path / "bad.lmdb")
        except DataError as error:
            assert "\n" not in str(error)


def test_a_folder_that_is_no_lmdb_is_refused(tmp_path):
    with pytest.raises(DataError, match="it has no data.mdb"):
        ids_of(tmp_path, tmp_path)


def test_a_missing_lmdb_says_what_to_install(tmp_path):
    write_lmdb(tmp_path / "pfam.lmdb", as_tape(["MK"]), 1)
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "lmdb.py").write_text("raise ImportError")
    done = subprocess.run([sys.executable, ROOT / "tools" / "preprocess_data.py", "--input", tmp_path / "pfam.lmdb",
                           "--output-prefix", tmp_path / "out"], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(tmp_path / "path")})
    assert done.returncode == 2
    assert "is an LMDB, which needs: pip install lmdb" in done.stderr
