"""Each kind of file gives the same proteins; damage gives one clear line, never a crash, a hang or a lost record."""

import collections
import gzip
import io
import json
import os
import pickle
import random
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.data.corpus.indexed import open_indexed
from megatron.data.preprocess.flags import PreprocessConfig
from megatron.data.preprocess.run import preprocess
from megatron.data.sources import streams
from megatron.data.sources.plain_pickle import load_plain_pickle
from megatron.data.sources.source import expand, texts_of
from megatron.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT.parent / "shared" / "data" / "proteins_demo"
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


def ids_of(tmp_path: Path, *sources: Path | str, **options) -> bytes:
    """The .bin and .idx that preprocessing writes; nothing else may be left."""
    prefix = tmp_path / "out"
    preprocess(PreprocessConfig(input=tuple(map(str, sources)), output_prefix=str(prefix), **options))
    assert not list(tmp_path.glob("*.partial"))
    return Path(f"{prefix}_text_document.bin").read_bytes() + Path(f"{prefix}_text_document.idx").read_bytes()


@pytest.fixture
def expected(tmp_path: Path) -> bytes:
    (tmp_path / "plain.txt").write_bytes(as_strings(PROTEINS))
    return ids_of(tmp_path, tmp_path / "plain.txt")


def zstd(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


PACKINGS: dict[str, Callable[[bytes], bytes]] = {"plain": bytes, "gzip": gzip.compress, "zstd": zstd,
            "gzip members": lambda data: gzip.compress(data[:999]) + gzip.compress(data[999:]),
            "zstd frames": lambda data: zstd(data[:999]) + zstd(data[999:]),
            "pzstd": lambda data: b"\x50\x2a\x4d\x18\4\0\0\0size" + zstd(data)}
KINDS: dict[str, Callable[..., bytes]] = {"json": as_json, "fasta": as_fasta, "strings": as_strings,
                                          "parquet": as_parquet}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_packing_gives_the_same_bytes(tmp_path, expected, kind, packing):
    (tmp_path / "misleading.name").write_bytes(PACKINGS[packing](KINDS[kind](PROTEINS)))
    assert ids_of(tmp_path, tmp_path / "misleading.name") == expected


def test_a_tape_lmdb_gives_the_same_bytes(tmp_path, expected):
    write_lmdb(tmp_path / "pfam.lmdb", as_tape(PROTEINS), len(PROTEINS))
    assert ids_of(tmp_path, tmp_path / "pfam.lmdb") == expected
    file = tmp_path / "pfam.lmdb" / "data.mdb"
    assert ids_of(tmp_path, file) == expected
    packed = gzip.compress(file.read_bytes())
    (tmp_path / "packed").write_bytes(packed)
    assert ids_of(tmp_path, tmp_path / "packed") == expected
    assert "gzip" in damaged(tmp_path, packed[:-100])


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
    for name in ("in.fasta", "in.json", "in.lmdb", "in.parquet"):
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


@pytest.mark.parametrize("line_end", [b"\r\n", b"\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("kind", ["json", "fasta", "strings"])
def test_line_ends_and_byte_order_marks_do_not_matter(tmp_path, expected, kind, mark, line_end, monkeypatch):
    monkeypatch.setattr(streams, "_CHUNK_BYTES", 7)
    (tmp_path / "in").write_bytes(mark + KINDS[kind](PROTEINS).replace(b"\n", line_end))
    assert ids_of(tmp_path, tmp_path / "in") == expected


@pytest.mark.parametrize("header", [b"\xe9\xff latin", "é".encode(), b"\x00", b"", b"x" * 1_000_000, b">>> a > b"])
def test_headers_may_hold_anything(tmp_path, header):
    (tmp_path / "in.fasta").write_bytes(b">" + header + b"\nMKV\n>" + header + b"\nMKV\n")
    assert ids_of(tmp_path, tmp_path / "in.fasta")[:12] == np.array([17, 15, 26] * 2, np.uint16).tobytes()


def test_a_latin_1_letter_among_residues_is_named(tmp_path):
    assert "line 2, column 2: 'é' is not a residue" in damaged(tmp_path, b">a\nM\xe9K\n")


def test_a_fasta_record_without_residues_is_a_counted_document(tmp_path):
    (tmp_path / "in.fasta").write_bytes(b"\n\n>a\n>b\nMK\n\n>c\n\n>d")
    ids_of(tmp_path, tmp_path / "in.fasta")
    assert open_indexed(str(tmp_path / "out_text_document")).doc_idx.tolist() == [0, 0, 1, 1, 1]


@given(proteins=st.lists(st.text(alphabet="ACDJ*-. \n", max_size=12), min_size=1, max_size=12),
       block=st.integers(1, 40), chunk=st.integers(1, 40), kind=st.sampled_from(["json", "fasta"]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_where_blocks_end_never_matters(tmp_path, monkeypatch, proteins, block, chunk, kind):
    monkeypatch.setattr(streams, "BLOCK_BYTES", block)
    monkeypatch.setattr(streams, "_CHUNK_BYTES", chunk)
    (tmp_path / "in").write_bytes(KINDS[kind](proteins))
    found = [text for source in expand([str(tmp_path / "in")]) for b in source.blocks(("text",))
             for text in texts_of(b, "text").texts]
    assert [text.split() for text in found] == [protein.encode().split() for protein in proteins] or kind == "fasta"
    assert [b"".join(text.split()) for text in found] == [b"".join(p.encode().split()) for p in proteins]


def test_an_error_in_a_later_block_names_the_right_line(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "BLOCK_BYTES", 64)
    for kind, line in (("json", 201), ("fasta", 402), ("strings", 201)):
        (tmp_path / "in").write_bytes(KINDS[kind](["MKV"] * 200 + ["MK7"]))
        with pytest.raises(DataError, match=f"line {line}, column 3"):
            ids_of(tmp_path, tmp_path / "in")


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_an_error_names_the_right_line_whatever_the_line_ends(tmp_path, monkeypatch, line_end):
    monkeypatch.setattr(streams, "_CHUNK_BYTES", 1)
    (tmp_path / "in").write_bytes(as_json(["M", "K", "M7"]).replace(b"\n", line_end))
    with pytest.raises(DataError, match="line 3, column 2"):
        ids_of(tmp_path, tmp_path / "in")


def damaged(tmp_path: Path, data: bytes) -> str:
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(DataError) as caught:
        ids_of(tmp_path, tmp_path / "bad")
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "bad"))
    assert "\n" not in message
    return message


@pytest.mark.parametrize("without_isal", [False, True])
def test_damaged_gzip_is_refused(tmp_path, monkeypatch, without_isal):
    if without_isal:
        monkeypatch.setitem(sys.modules, "isal", None)
    whole = gzip.compress(as_strings(PROTEINS))
    for size in (2, 9, 100, len(whole) // 2, len(whole) - 1):
        assert "gzip" in damaged(tmp_path, whole[:size])
    assert "gzip" in damaged(tmp_path, whole[:-8] + b"\0" * 8)
    assert "gzip" in damaged(tmp_path, whole[:500] + b"\xff" * 50 + whole[550:])


def test_damaged_zstd_is_refused(tmp_path):
    whole = zstd(as_strings(PROTEINS))
    for size in (4, 9, 100, len(whole) // 2, len(whole) - 1):
        assert "zstd" in damaged(tmp_path, whole[:size])
    assert "zstd" in damaged(tmp_path, whole + b"trailing")


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


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_that_would_run_code_are_refused(protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in (Evil(), {"primary": Evil()}, [getattr], np.array([Evil()], dtype=object), open_indexed):
        with pytest.raises(pickle.UnpicklingError, match="which is not plain data|cannot be"):
            load_plain_pickle(pickle.dumps(value, protocol=protocol))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_are_read(protocol):
    value = {"primary": "MK", "n": 3, "x": 1.5, "b": b"\x00\xff", "t": (1, None, True), "s": {1}, "big": 10**30,
             "f": np.float32(2.5), "i": np.int64(7)}
    assert load_plain_pickle(pickle.dumps(value, protocol=protocol)) == value
    value = collections.OrderedDict([("a", [frozenset({3}), b""]), (2, set())])
    assert load_plain_pickle(pickle.dumps(value, protocol=protocol)) == value
    for array in (np.arange(6).reshape(2, 3), np.array(["ab", "c"]), np.zeros(0), np.array([{"a": 1}], dtype=object),
                  np.asfortranarray(np.arange(6).reshape(2, 3)), np.arange(3).astype(">i4"), np.array(2.5)):
        pickled = pickle.dumps(array, protocol=protocol)
        loaded = load_plain_pickle(pickled)
        assert loaded.dtype == pickle.loads(pickled).dtype
        assert loaded.shape == array.shape
        assert loaded.tolist() == array.tolist()


@pytest.mark.parametrize("data", [
    b"cbuiltins\nbytes\n(I10000000000000\ntR.", b"cnumpy\nndarray\n((I10000000000000\nttR.",
    b"c_codecs\nencode\n(V\nVrot13\ntR)R.", b"cbuiltins\ngetattr\n.", b"cnumpy.core.multiarray\nfromfile\n."])
def test_allowed_names_cannot_be_turned_to_other_ends(data):
    with pytest.raises(pickle.UnpicklingError):
        load_plain_pickle(data)


def test_a_short_pickle_cannot_fill_the_memory():
    assert load_plain_pickle(b"\x80\x02}r\xff\xff\xff\x7f.") == {}
    tracemalloc.start()
    try:
        bytes_of_its_own = b"\x80\x05\x96" + (1 << 33).to_bytes(8, "little") + b"."
        copies = b"\x80\x04]c_codecs\nencode\nq\x00X\x00\x00\x01\x00" + b"a" * 65536 + b"q\x01U\x06latin1q\x02000("
        for data in (bytes_of_its_own, copies + b"h\x00h\x01h\x02\x86R" * 1000 + b"e."):
            with pytest.raises(pickle.UnpicklingError):
                load_plain_pickle(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


def test_a_short_pickle_cannot_take_for_ever():
    """The hash of nested tuples that share their parts takes twice as long with each level."""
    nested = b")" + b"2\x86" * 60
    for data in (b"}" + nested + b"K\x01s.", b"}(" + nested + b"K\x01u.", b"(" + nested + b"K\x01d.",
                 b"\x8f(" + nested + b"\x90.", b"(" + nested + b"\x91.", b"cbuiltins\nset\n](" + nested + b"e\x85R.",
                 b"ccollections\nOrderedDict\n](" + nested + b"K\x01\x86e\x85R.",
                 b"c_codecs\nencode\n}(" + nested + b"K\x01ub."):
        with pytest.raises(pickle.UnpicklingError, match="tuple for a key"):
            load_plain_pickle(b"\x80\x04" + data)


def test_a_pickle_cannot_make_addresses_of_numbers():
    """A structured kind that says it holds objects, but not that they are counted: its data would be taken for them."""
    kind = (b"cnumpy\ndtype\n(X\x02\x00\x00\x00V8K\x00K\x01tR(K\x03X\x01\x00\x00\x00|NX\x01\x00\x00\x00a\x85}"
            b"X\x01\x00\x00\x00acnumpy\ndtype\n(X\x02\x00\x00\x00O8K\x00K\x01tRK\x00\x86sK\x08K\x01K\x00tb")
    scalar = b"cnumpy.core.multiarray\nscalar\n" + kind + b"C\x08AAAAAAAA\x86R"
    objects = np.array([None], dtype=object)
    of_other_size = pickle.dumps(objects, protocol=2).replace(b"K\x01\x85", b"K\x7f\x85", 1)
    for data in (b"\x80\x03}" + scalar + b"K\x01s.", b"\x80\x03" + kind + b".",
                 b"\x80\x03" + kind.replace(b"V8", b"i8") + b".", of_other_size,
                 pickle.dumps(np.arange(3), protocol=2).replace(b"i8", b"O8")):
        with pytest.raises(pickle.UnpicklingError):
            load_plain_pickle(data)


@given(data=st.binary(max_size=200), seed=st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_a_damaged_pickle_is_an_unpickling_error_or_plain_data(data, seed):
    generator = random.Random(seed)
    mutated = bytearray(pickle.dumps({"primary": "MKV", "a": np.arange(3), "n": [1, (2, 3)]}, protocol=seed % 5))
    for _ in range(generator.randrange(1, 6)):
        mutated[generator.randrange(len(mutated))] = generator.randrange(256)
    for candidate in (data, bytes(mutated)):
        try:
            load_plain_pickle(candidate)
        except pickle.UnpicklingError as error:
            assert str(error)


@given(data=st.binary(max_size=300),
       start=st.sampled_from([b"", b">", b"{", b"PAR1", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"MKV\n", b'{"text": "',
                              b"\xef\xbb\xbf", b"\xff\xfe"]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes_are_read_right_or_refused_in_one_line(tmp_path, data, start):
    (tmp_path / "in").write_bytes(start + data)
    try:
        ids_of(tmp_path, tmp_path / "in", skip_bad_records=len(data) % 2 == 0)
    except DataError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("kind", ["json", "fasta", "strings", "parquet"])
def test_flipped_bytes_are_read_right_or_refused_in_one_line(tmp_path, kind):
    """Every record is either read, reported as bad, or the whole file is refused."""
    generator = random.Random(kind)
    whole = KINDS[kind](["MKV" * 9] * 30)
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(generator.randrange(1, 8)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        (tmp_path / "in").write_bytes(data)
        try:
            ids_of(tmp_path, tmp_path / "in")
        except DataError as error:
            assert "\n" not in str(error)


def test_a_file_of_bad_records_alone_takes_no_longer(tmp_path):
    (tmp_path / "in").write_bytes(b"1\n" * 100_000 + b"MK\n")
    ids_of(tmp_path, tmp_path / "in", skip_bad_records=True)
    stats = json.loads((tmp_path / "out.stats.json").read_text())
    assert stats["outputs"]["text"]["dropped"] == {"not protein": 100_000}


def test_a_long_record_in_small_chunks_is_searched_once(monkeypatch):
    monkeypatch.setattr(streams, "BLOCK_BYTES", 1 << 10)
    begun = time.monotonic()
    assert [len(block) for block in streams.cut([b"A" * 64] * 100_000 + [b"\nMK\n"], b"\n", "in")] == [6_400_001, 3]
    assert time.monotonic() - begun < 2  # searched anew with each chunk, it takes a minute


def test_a_record_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "BLOCK_BYTES", 1 << 10)
    monkeypatch.setattr(streams, "MAX_RECORD_BYTES", 1 << 20)
    assert "a record of more than" in damaged(tmp_path, gzip.compress(b"A" * (5 << 20)))


@pytest.mark.parametrize(("head", "name"), [(b"BZh91AY", "bzip2"), (b"\xfd7zXZ\0\0", "xz"), (b"PK\x03\x04..", "zip")])
def test_other_packings_are_named(tmp_path, head, name):
    assert f"is packed with {name}" in damaged(tmp_path, head + bytes(50))


@pytest.mark.parametrize(("module", "data"), [
    ("zstandard", b"\x28\xb5\x2f\xfd" + bytes(20)), ("pyarrow", b"PAR1" + bytes(20))])
def test_a_missing_library_says_what_to_install(tmp_path, monkeypatch, module, data):
    monkeypatch.setitem(sys.modules, module, None)
    assert f"pip install {module}" in damaged(tmp_path, data)


def test_a_missing_lmdb_says_what_to_install(tmp_path):
    write_lmdb(tmp_path / "pfam.lmdb", as_tape(["MK"]), 1)
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "lmdb.py").write_text("raise ImportError")
    done = subprocess.run([sys.executable, ROOT / "tools" / "preprocess_data.py", "--input", tmp_path / "pfam.lmdb",
                           "--output-prefix", tmp_path / "out"], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(tmp_path / "path")})
    assert done.returncode == 2
    assert "is an LMDB, which needs: pip install lmdb" in done.stderr


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
