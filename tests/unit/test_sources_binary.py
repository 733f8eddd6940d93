"""Parquet, Arrow and LMDB: every text type is read, damage gives one clear line, and no reader crashes."""

import gzip
import hashlib
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.data.sources.binary.tape_lmdb import parse_lmdb
from megatron.data.sources.block import RecordBlock
from megatron.data.sources.source import expand
from megatron.errors import DataError
from tests.unit.protein_files import (
    PROTEINS,
    as_arrow_file,
    as_arrow_stream,
    as_parquet,
    as_strings,
    as_tape,
    damaged,
    ids_of,
    read_or_refused,
    write_lmdb,
)

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


TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


@pytest.mark.parametrize("is_dictionary", [False, True])
@pytest.mark.parametrize("name", TEXT_TYPES)
def test_every_type_of_text_is_read(tmp_path, expected, name, is_dictionary):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    column = pa.array(PROTEINS, type=getattr(pa, name)())
    if is_dictionary:
        column = pa.DictionaryArray.from_arrays(pa.array(range(len(PROTEINS))), column)
    table = pa.table({"text": column})
    with pa.ipc.new_stream(tmp_path / "in.arrow", table.schema) as stream:
        stream.write_table(table)
    assert ids_of(tmp_path, tmp_path / "in.arrow") == expected
    if not is_dictionary or not name.endswith("view"):  # Parquet writes no dictionaries of views
        pq.write_table(table, tmp_path / "in.parquet")
        assert ids_of(tmp_path, tmp_path / "in.parquet") == expected


def test_columns_that_are_no_text_are_refused_by_their_type(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    fixed = pa.array([b"MK"], pa.binary(2))
    for column, kind in (([1.5], "double"), ([["MK"]], "list<"), (fixed, "fixed_size_binary")):
        table = pa.table({"text": column})
        pq.write_table(table, tmp_path / "in.parquet")
        with pa.ipc.new_file(tmp_path / "in.arrow", table.schema) as file:
            file.write_table(table)
        for name in ("in.parquet", "in.arrow"):
            with pytest.raises(DataError, match=f"holds {kind}.*expected text"):
                ids_of(tmp_path, tmp_path / name)
    pq.write_table(pa.Table.from_arrays([pa.array(["M"])] * 2, names=["text"] * 2), tmp_path / "in.parquet")
    with pytest.raises(DataError, match="is Parquet with 2 columns 'text'"):
        ids_of(tmp_path, tmp_path / "in.parquet")


@pytest.mark.parametrize("write", [as_arrow_stream, as_arrow_file])
def test_a_truncated_arrow_is_refused_wherever_it_ends(tmp_path, write):
    whole = write(PROTEINS[:2] * 4)
    for size in (*range(8, len(whole), 56), len(whole) - 8, len(whole) - 1):
        assert "Arrow" in damaged(tmp_path, whole[:size])


def test_a_large_batch_of_arrow_comes_in_small_blocks(tmp_path):
    pa = pytest.importorskip("pyarrow")
    batch = pa.record_batch({"text": ["A" * (1 << 18)] * 32})
    with pa.ipc.new_stream(tmp_path / "in", batch.schema) as stream:
        stream.write_batch(batch)
    lengths = [len(block.records["text"]) for block in expand([str(tmp_path / "in")])[0].blocks(("text",))]
    assert sum(lengths) == 32
    assert max(lengths) <= 8


def write_folder(folder: Path, parts: dict[str, list[str]], **state) -> Path:
    """What HuggingFace's save_to_disk leaves."""
    folder.mkdir()
    for name, proteins in parts.items():
        (folder / name).write_bytes(as_arrow_stream(proteins))
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def test_a_folder_of_save_to_disk_is_read_in_the_order_of_its_state(tmp_path, expected):
    parts = {"data-00000-of-00002.arrow": PROTEINS[2:], "data-00001-of-00002.arrow": PROTEINS[:2]}
    listed = [{"filename": name} for name in reversed(parts)]
    folder = write_folder(tmp_path / "saved", parts, _data_files=listed, _indices_files=None)
    assert ids_of(tmp_path, folder) == expected
    inputs = json.loads((tmp_path / "out.stats.json").read_text())["inputs"]
    both = b"".join((folder / entry["filename"]).read_bytes() for entry in listed)
    assert [inputs[0]["bytes"], inputs[0]["sha256"]] == [len(both), hashlib.sha256(both).hexdigest()]
    (folder / "state.json").unlink()
    assert ids_of(tmp_path, folder) != expected  # by name


@pytest.mark.parametrize(("parts", "state", "message"), [
    (["data-00000-of-00002.arrow"], {}, r"has lost one of data-\*-of-00002.arrow"),
    (["a.arrow"], {"_data_files": [{"filename": "../b.arrow"}]}, "has lost ../b.arrow; copy it again"),
    (["a.arrow"], {"_data_files": 7}, "state.json: not the list"),
    (["a.arrow"], {"_data_files": [{"filename": "a.arrow"}], "_indices_files": [1]}, r"flatten_indices\(\) before"),
    (["a.arrow", "cache-1.arrow"], {}, "results of HuggingFace's map"),
    ([], {}, "it has no data.mdb")])
def test_a_folder_that_is_not_whole_is_refused(tmp_path, parts, state, message):
    with pytest.raises(DataError, match=message):
        ids_of(tmp_path, write_folder(tmp_path / "saved", {name: ["MK"] for name in parts}, **state))


def test_the_parts_of_a_dataset_dict_are_asked_for(tmp_path):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(DataError, match=f"DatasetDict of HuggingFace; name its parts, for example {tmp_path}/train"):
        ids_of(tmp_path, tmp_path)


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


@pytest.mark.parametrize(("value", "message"), [
    (b"junk", "record 8: cannot be unpickled"),
    (pickle.dumps({"primary": "MK"})[:-5], "record 8: cannot be unpickled"),
    (pickle.dumps([1]), "record 8: list where a dict belongs"),
    (pickle.dumps({"sequence": "MK"}), "record 8: no key 'primary'; it has 'sequence'"),
    (pickle.dumps({"primary": 3}), "record 8: 'primary' is of type int"),
    (None, "record 8: is missing; the LMDB is not whole")])
def test_a_bad_record_of_a_tape_lmdb_is_named(value, message):
    parsed = parse_lmdb(RecordBlock("pfam.lmdb", "lmdb", [pickle.dumps({"primary": "MK"}), value], 7, 0), "text")
    assert parsed.texts == [b"MK", b""]
    assert parsed.bad[1].message.startswith(f"pfam.lmdb: {message}")


@pytest.mark.parametrize(("values", "num_examples", "message"), [
    ([pickle.dumps({"primary": "M"}), None, pickle.dumps({"primary": "K"})], 3, "it says 3 records and has 3 entries"),
    ([pickle.dumps({"primary": "MK7"})], 1, "record 1, column 3: '7' is not a residue"),
    ([pickle.dumps({"primary": "M"})] * 3, 2, "'num_examples' says 2 records, but there are more"),
    ([], None, "no readable 'num_examples'"),
    ([pickle.dumps({"primary": "MK"})], "many", "it says 'many' records"),
    ([pickle.dumps({"primary": "MK"})], 10**15, "it says 1000000000000000 records"),
])
def test_a_tape_lmdb_that_is_not_whole_is_refused(tmp_path, values, num_examples, message):
    write_lmdb(tmp_path / "bad.lmdb", values, num_examples)
    with pytest.raises(DataError) as caught:
        ids_of(tmp_path, tmp_path / "bad.lmdb")
    assert message in str(caught.value)


def test_a_tape_lmdb_at_a_path_that_is_no_utf_8_is_read(tmp_path):
    folder = tmp_path / os.fsdecode(b"pfam\xe9.lmdb")
    write_lmdb(tmp_path / "pfam.lmdb", as_tape(["MKV"]), 1).rename(folder)
    (block,) = expand([str(folder)])[0].blocks(("text",))
    assert parse_lmdb(block, "text").texts == [b"MKV"]


@pytest.mark.parametrize("size", [20, 4096, 9000, 30_000])
def test_a_truncated_lmdb_is_refused_though_it_would_crash_its_reader(tmp_path, size):
    write_lmdb(tmp_path / "bad.lmdb", as_tape(PROTEINS * 20), len(PROTEINS) * 20)
    os.truncate(tmp_path / "bad.lmdb" / "data.mdb", size)
    with pytest.raises(DataError, match="bad.lmdb"):
        ids_of(tmp_path, tmp_path / "bad.lmdb")


def test_a_damaged_lmdb_is_read_or_refused_in_one_line(tmp_path):
    write_lmdb(tmp_path / "bad.lmdb", as_tape(PROTEINS), len(PROTEINS))
    file = tmp_path / "bad.lmdb" / "data.mdb"
    whole = file.read_bytes()
    generator = random.Random(4)
    for _ in range(3):
        data = bytearray(whole)
        for _ in range(400):
            data[generator.randrange(len(data))] = generator.randrange(256)
        file.write_bytes(data)
        read_or_refused(tmp_path, tmp_path / "bad.lmdb")


def test_a_missing_lmdb_says_what_to_install(tmp_path):
    write_lmdb(tmp_path / "pfam.lmdb", as_tape(["MK"]), 1)
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "lmdb.py").write_text("raise ImportError")
    done = subprocess.run([sys.executable, ROOT / "tools" / "preprocess_data.py", "--input", tmp_path / "pfam.lmdb",
                           "--output-prefix", tmp_path / "out"], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(tmp_path / "path")})
    assert done.returncode == 2
    assert "is an LMDB, which needs: pip install lmdb" in done.stderr
