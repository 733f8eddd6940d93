"""Every file format and compression gives the same proteins; damage gives one clear line, never a crash or a loss."""

import gzip
import os
import pickle
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.errors import DataError
from tests.unit.protein_files import (
    KINDS,
    PROTEINS,
    as_fasta,
    as_json,
    as_strings,
    as_tape,
    damaged,
    ids_of,
    read_or_refused,
    write_lmdb,
)

DEMO = Path(__file__).resolve().parents[3] / "shared" / "data" / "proteins_demo"


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("expected")
    (folder / "plain.txt").write_bytes(as_strings(PROTEINS))
    return ids_of(folder, folder / "plain.txt")


def zstd(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress, "gzip members": lambda data: gzip.compress(data[:999]) + gzip.compress(data[999:]),
    "zstd": zstd, "zstd frames": lambda data: zstd(data[:999]) + zstd(data[999:]),
    "pzstd": lambda data: b"\x50\x2a\x4d\x18\4\0\0\0size" + zstd(data)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_bytes(tmp_path, expected, kind):
    (tmp_path / "misleading.name").write_bytes(KINDS[kind](PROTEINS))
    assert ids_of(tmp_path, tmp_path / "misleading.name") == expected


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_packing_gives_the_same_bytes(tmp_path, expected, packing):
    for kind in ("fasta", "parquet"):
        (tmp_path / "misleading.name").write_bytes(PACKINGS[packing](KINDS[kind](PROTEINS)))
        assert ids_of(tmp_path, tmp_path / "misleading.name") == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipe_gives_the_same_bytes(tmp_path, expected, kind):
    data = KINDS[kind](PROTEINS)
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,))
    writer.start()
    assert ids_of(tmp_path, tmp_path / "pipe") == expected
    writer.join()


def test_names_come_from_every_kind(tmp_path):
    (tmp_path / "in.fasta").write_bytes(b">7 a\nMK\n>x|\xc3\xa9\tb\nV\n")
    (tmp_path / "in.json").write_text('{"id": 7, "text": "MK"}\n{"text": "V", "id": "x|\\u00e9 b"}\n')
    ids = [np.int64(7), "x|é b"]
    values = [pickle.dumps({"primary": text, "id": name}) for text, name in zip(("MK", "V"), ids, strict=True)]
    write_lmdb(tmp_path / "in.lmdb", values, 2)
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"id": ["7 a", "x|é"], "text": ["MK", "V"]}), tmp_path / "in.parquet")
    (tmp_path / "in.csv").write_bytes(b'text,id\nMK,7 a\nV,"x|\xc3\xa9 ""b"""\n')
    for name in ("in.fasta", "in.json", "in.lmdb", "in.parquet", "in.csv"):
        ids_of(tmp_path, tmp_path / name, names=True)
        assert (tmp_path / "out_text_document.names").read_bytes() == b"7\nx|\xc3\xa9\n", name
    pq.write_table(pa.table({"id": [7, None], "text": ["MK", "V"]}), tmp_path / "in.parquet")
    with pytest.raises(DataError, match="record 2: no name under 'id'"):
        ids_of(tmp_path, tmp_path / "in.parquet", names=True)
    pq.write_table(pa.table({"id": [1.5], "text": ["MK"]}), tmp_path / "in.parquet")
    with pytest.raises(DataError, match="column 'id' holds double"):
        ids_of(tmp_path, tmp_path / "in.parquet", names=True)
    with pytest.raises(DataError, match="no column 'n'.*--name-key"):
        ids_of(tmp_path, tmp_path / "in.parquet", names=True, name_key="n")


def test_several_files_and_patterns_are_read_in_order(tmp_path, expected):
    for number, protein in enumerate(PROTEINS):
        (tmp_path / f"part-{number}.fa").write_bytes(as_fasta([protein]))
    assert ids_of(tmp_path, tmp_path / "part-0.fa", tmp_path / "part-[1-9].fa") == expected


@pytest.mark.parametrize("without_isal", [False, True])
def test_damaged_gzip_is_refused(tmp_path, monkeypatch, without_isal):
    if without_isal:
        monkeypatch.setitem(sys.modules, "isal", None)
    whole = gzip.compress(as_strings(PROTEINS))
    for size in (2, 9, 100, len(whole) // 2, len(whole) - 1):
        assert "gzip" in damaged(tmp_path, whole[:size])
    assert "gzip" in damaged(tmp_path, whole[:-8] + b"\0" * 8)
    assert "gzip" in damaged(tmp_path, whole[:500] + b"\xff" * 50 + whole[550:])


def test_zstd_of_a_long_window_is_read(tmp_path):
    pytest.importorskip("zstandard")
    proteins = b"MKV\nAC\n"
    window, block = bytes([(28 - 10) << 3]), (len(proteins) << 3 | 1).to_bytes(3, "little")  # of 2^28; raw, the last
    (tmp_path / "in.zst").write_bytes(b"\x28\xb5\x2f\xfd\0" + window + block + proteins)
    (tmp_path / "in").write_bytes(proteins)
    assert ids_of(tmp_path, tmp_path / "in.zst") == ids_of(tmp_path, tmp_path / "in")


def test_damaged_zstd_is_refused(tmp_path):
    whole = zstd(as_strings(PROTEINS))
    for size in (4, 9, 100, len(whole) // 2, len(whole) - 1):
        assert "zstd" in damaged(tmp_path, whole[:size])
    assert "zstd" in damaged(tmp_path, whole + b"trailing")


@given(data=st.binary(max_size=300),
       start=st.sampled_from([b"", b">", b"{", b"PAR1", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"MKV\n", b'{"text": "',
                              b"\xef\xbb\xbf", b"\xff\xfe", b"id,text\n", b"\xff\xff\xff\xff"]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes_are_read_or_refused_in_one_line(tmp_path, data, start):
    (tmp_path / "in").write_bytes(start + data)
    read_or_refused(tmp_path, tmp_path / "in", skip_bad_records=len(data) % 2 == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bytes_are_read_or_refused_in_one_line(tmp_path, kind):
    """Every record is either read, reported as bad, or the whole file is refused."""
    generator = random.Random(kind)
    whole = KINDS[kind](["MKV" * 9] * 30)
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(generator.randrange(1, 8)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        (tmp_path / "in").write_bytes(data)
        read_or_refused(tmp_path, tmp_path / "in")


@pytest.mark.parametrize(("module", "data"), [
    ("zstandard", b"\x28\xb5\x2f\xfd" + bytes(20)), ("pyarrow", b"PAR1" + bytes(20))])
def test_a_missing_library_says_what_to_install(tmp_path, monkeypatch, module, data):
    monkeypatch.setitem(sys.modules, module, None)
    assert f"pip install {module}" in damaged(tmp_path, data)


@pytest.mark.skipif(not DEMO.exists(), reason=f"{DEMO} is not there")
def test_real_proteins_in_each_form_give_the_same_bytes(tmp_path):
    fasta = gzip.decompress((DEMO / "small.fasta.gz").read_bytes()).decode()
    proteins = [record.partition("\n")[2].replace("\n", "") for record in fasta[1:].split("\n>")]
    reference = ids_of(tmp_path, DEMO / "small.fasta.gz")
    assert len(reference) > 2 * 1_555_475
    for kind, write in KINDS.items():
        (tmp_path / kind).write_bytes(write(proteins))
        assert ids_of(tmp_path, tmp_path / kind) == reference
    write_lmdb(tmp_path / "tape", as_tape(proteins), len(proteins))
    assert ids_of(tmp_path, tmp_path / "tape") == reference
    (tmp_path / "spaced").write_bytes(as_json(" ".join(protein) for protein in proteins))
    assert ids_of(tmp_path, tmp_path / "spaced") == reference
