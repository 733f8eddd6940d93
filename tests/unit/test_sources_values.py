"""Whole records of every file format: all values by key, and each record's place in its file."""

import json
import pickle

import numpy as np
import pytest

from megatron.data.sources import streams
from megatron.data.sources.source import Source, names_of, records_of
from megatron.errors import DataError
from tests.unit.protein_files import damaged, ids_of, write_json, write_lmdb


def records(path):
    return [found for block in Source(str(path)).blocks() for found in records_of(block)]


def written(tmp_path, data):
    (tmp_path / "in").write_bytes(data)
    return records(tmp_path / "in")


@pytest.mark.parametrize(("data", "expected"), [
    (b'{"seq": "MK", "y": [1, null]}\n\n{"y": NaN}\n', [("line 1", {"seq": "MK", "y": [1, None]}),
                                                       ("line 3", {"y": pytest.approx(np.nan, nan_ok=True)})]),
    (b'seq,"a;b"\nMK, 1.5\n\n"M","x;y"\n', [("line 2", {"seq": "MK", "a;b": "1.5"}),
                                           ("line 4", {"seq": "M", "a;b": "x;y"})]),
    (b"seq\ty\nMK\t\n", [("line 2", {"seq": "MK", "y": ""})]),
    (b"; a comment\n>P1 of man\nMK\nV\n>P2\nM\n", [("line 2", {"id": "P1", "sequence": "MK\nV"}),
                                                   ("line 5", {"id": "P2", "sequence": "M\n"})]),
    (b"\nMKV\n\nACD\n", [("line 2", {"sequence": "MKV"}), ("line 4", {"sequence": "ACD"})])])
def test_records_of_text_hold_all_values_and_say_their_line(tmp_path, data, expected):
    assert written(tmp_path, data) == expected


def test_records_of_parquet_and_arrow_hold_values_of_any_type(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"seq": ["MK", "V"], "y": [0.5, None], "n": [3, 4], "ca": [[[1.0, 2.0, 3.0], None], []]}
    expected = [(f"record {number + 1}", {key: values[number] for key, values in columns.items()})
                for number in range(2)]
    pq.write_table(pa.table(columns), tmp_path / "parquet")
    with pa.ipc.new_stream(str(tmp_path / "arrow"), pa.table(columns).schema) as stream:
        stream.write_table(pa.table(columns))
    assert records(tmp_path / "parquet") == records(tmp_path / "arrow") == expected
    doubled = pa.table([["MK"], ["V"]], names=["seq", "seq"])
    with pa.ipc.new_stream(str(tmp_path / "arrow"), doubled.schema) as stream:
        stream.write_table(doubled)
    with pytest.raises(DataError, match="has two columns 'seq'; rename one"):
        records(tmp_path / "arrow")


def test_records_of_an_lmdb_hold_arrays(tmp_path):
    values = [{"primary": "MK", "ss3": np.array([0, 2]), "tertiary": np.ones((2, 3), np.float32)}, {"primary": "V"}]
    write_lmdb(tmp_path / "lmdb", [pickle.dumps(value) for value in values], 2)
    (first, one), (second, other) = records(tmp_path / "lmdb")
    assert (first, second, one["primary"], other) == ("record 1", "record 2", "MK", {"primary": "V"})
    assert one["ss3"].tolist() == [0, 2]
    assert one["tertiary"].tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize("chunk_bytes", [1, 7, 1 << 20])
def test_a_json_array_reads_as_the_same_objects_a_line(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(streams, "_CHUNK_BYTES", chunk_bytes)
    texts = ["MKV", "", "ACD"]
    objects = [{"id": number, "text": text, "é": ["]", {"a": 1.5}]} for number, text in enumerate(texts)]
    (tmp_path / "array").write_text(json.dumps(objects, ensure_ascii=False, indent=1), encoding="utf-8")
    assert records(tmp_path / "array") == [(f"record {number + 1}", each) for number, each in enumerate(objects)]
    block = next(Source(str(tmp_path / "array")).blocks(("text",), "id"))
    assert names_of(block, "id").texts == [b"0", b"1", b"2"]
    write_json(tmp_path / "lines", texts)
    assert ids_of(tmp_path, tmp_path / "array") == ids_of(tmp_path, tmp_path / "lines")


@pytest.mark.parametrize(("data", "message"), [
    (b'[{"text": "MK"}, {"text": "V"', "record 2: not JSON, or cut short"),
    (b'[{"text": "MK"}', "record 2: not JSON, or cut short"),
    (b'[{"text": "MK"} {"text": "V"}]', "record 1: '{' behind it, where a comma or ']' belongs"),
    (b'[{"text": "MK"}]\n{}', "more text behind the JSON array"),
    (b'[{"text": "MK"}, {"seq": "V"}]', "record 2: no key 'text'"),
    (b'[{"text": "MK"}, "V"]', "record 2: str where a JSON object belongs"),
    (b'[{"text": "M1"}]', "record 1, column 2: '1' is not a residue"),
    (b'[{"text": "\xff"}]', "not UTF-8 text")])
def test_what_is_wrong_in_a_json_array_is_one_clear_line(tmp_path, data, message):
    assert message in damaged(tmp_path, data)


@pytest.mark.parametrize(("data", "message"), [
    (b'{"seq": "MK"}\n{"seq"', "line 2: not a JSON object"),
    (b'{"seq": "MK"}\n[3]\n', "line 2: list where a JSON object belongs"),
    (b'[{"seq": "MK"}, 3]', "record 2: int where a JSON object belongs"),
    (b"seq,y\nMK,1\nM\n", "line 3: 1 fields where the header has 2")])
def test_a_bad_record_says_where_it_is_and_what_it_has_not(tmp_path, data, message):
    (_, good), (place, bad) = written(tmp_path, data)
    assert good["seq"] == "MK" and f"{place}: {bad.message}".startswith(message)


@pytest.mark.parametrize(("data", "message"), [
    (b"seq,y,y\nMK,1,2\n", "in: has two columns 'y'; rename one of them"),
    (b"\n", "in: is empty; expected proteins as JSON")])
def test_a_file_of_no_kind_is_named(tmp_path, data, message):
    with pytest.raises(DataError, match=message):
        written(tmp_path, data)


def test_a_damaged_record_of_an_lmdb_names_its_number(tmp_path):
    write_lmdb(tmp_path / "lmdb", [pickle.dumps({"primary": "MK"}), b"?"], 2)
    place, bad = records(tmp_path / "lmdb")[1]
    assert place == "record 2" and bad.message.startswith("cannot be unpickled")
