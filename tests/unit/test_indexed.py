"""Indexed datasets: bytes as the original wrote them, views of what is stored, and damage that is refused by name."""

import errno
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron.data.corpus.indexed import DTYPES, IMPLEMENTATIONS, open_indexed
from megatron.data.corpus.indexed_writer import IndexedWriter
from megatron.data.corpus.joined import open_corpus
from megatron.data.corpus.tokenizer import build_tokenizer
from megatron.data.corpus.vocab import Vocab
from megatron.errors import DataError
from tests.indexed_files import write_indexed

FIXTURE = Path(__file__).resolve().parents[2].parent / "shared" / "fixtures" / "preprocess_set1"
DOCUMENTS = [np.array([6, 7, 8]), np.array([], dtype=np.int64), np.array([30]), np.arange(6, 31)]


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return str(tmp_path / "proteins")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.skipif(not FIXTURE.exists(), reason=f"{FIXTURE} is not there")
def test_files_are_byte_for_byte_those_of_the_original(prefix, impl):
    tokenizer = build_tokenizer("BertWordPieceCase", Vocab.from_file())
    texts = (FIXTURE / "sequences.txt").read_text().split()
    write_indexed(prefix, (tokenizer.encode(text) for text in texts), impl)
    for ending in ("bin", "idx"):
        expected = (FIXTURE / impl / f"spaced_text_document.{ending}").read_bytes()
        assert Path(f"{prefix}.{ending}").read_bytes() == expected


def test_the_mmap_layout_is_the_documented_one(prefix):
    write_indexed(prefix, DOCUMENTS)
    assert Path(f"{prefix}.bin").read_bytes() == np.concatenate(DOCUMENTS).astype("<u2").tobytes()
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 5)
    arrays = struct.pack("<3i", 3, 1, 25) + struct.pack("<3q", 0, 6, 8) + struct.pack("<5q", 0, 1, 1, 2, 3)
    assert Path(f"{prefix}.idx").read_bytes() == header + arrays


def test_the_cached_layout_is_the_documented_one(prefix):
    write_indexed(prefix, DOCUMENTS, "cached")
    assert Path(f"{prefix}.bin").read_bytes() == np.concatenate(DOCUMENTS).astype("<i4").tobytes()
    header = b"TNTIDX\0\0" + struct.pack("<6Q", 1, 4, 4, 3, 3, 5)
    arrays = struct.pack("<4q", 0, 1, 2, 3) + struct.pack("<4q", 0, 3, 4, 29) + struct.pack("<3q", 3, 1, 25)
    assert Path(f"{prefix}.idx").read_bytes() == header + arrays + struct.pack("<5q", 0, 1, 1, 2, 3)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("opened_as", ["infer", "same"])
def test_what_was_written_is_read_back(prefix, impl, opened_as):
    write_indexed(prefix, DOCUMENTS, impl)
    dataset = open_indexed(prefix, impl if opened_as == "same" else "infer")
    sequences = [ids for ids in DOCUMENTS if len(ids)]
    assert len(dataset) == 3
    assert dataset.num_documents == 4
    assert dataset.sizes.tolist() == [3, 1, 25]
    assert dataset.sizes.dtype == np.int32
    assert dataset.doc_idx.tolist() == [0, 1, 1, 2, 3]
    assert all(np.array_equal(dataset[i], sequences[i]) for i in range(3))


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_every_integer_dtype_of_megatron_is_read(prefix, dtype):
    code = next(code for code, kind in DTYPES.items() if kind is dtype)
    Path(f"{prefix}.bin").write_bytes(np.array([1, 2, 3], dtype=dtype).tobytes())
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, 2, 3) + struct.pack("<2i", 1, 2)
    index += struct.pack("<2q", 0, np.dtype(dtype).itemsize) + struct.pack("<3q", 0, 1, 2)
    Path(f"{prefix}.idx").write_bytes(index)
    dataset = open_indexed(prefix)
    assert dataset.dtype == dtype
    assert dataset[1].tolist() == [2, 3]


def test_sequences_are_views_and_cannot_be_written(prefix):
    write_indexed(prefix, DOCUMENTS)
    dataset = open_indexed(prefix)
    assert np.shares_memory(dataset[0], dataset.tokens)
    with pytest.raises(ValueError, match="read-only"):
        dataset[0][0] = 1


def test_a_pickled_dataset_is_reopened_and_small(prefix):
    write_indexed(prefix, [np.full(100_000, 6)])
    data = pickle.dumps(open_indexed(prefix))
    assert len(data) < 1000
    assert pickle.loads(data)[0].sum() == 600_000


def test_the_identity_tells_datasets_apart(tmp_path):
    for name, documents in (("a", DOCUMENTS), ("b", DOCUMENTS), ("c", DOCUMENTS[::-1]), ("d", DOCUMENTS[:2])):
        write_indexed(tmp_path / name, documents)
    a, b, c, d = (open_corpus(name, (str(tmp_path / name),)).identity for name in "abcd")
    assert a == b
    assert len({a, c, d}) == 3


def test_nothing_overflows_beyond_32_bits(prefix):
    """Three sequences of 2^31 - 1 ids: 13 GB, of which a sparse file needs none."""
    longest = np.iinfo(np.int32).max
    with IndexedWriter(prefix) as writer:
        writer.add(np.array([], dtype=np.uint16), np.full(3, longest), np.array([1, 2]))
    with open(f"{prefix}.bin", "r+b") as file:
        file.truncate(2 * 3 * longest)
        file.seek(2 * (2 * longest + 5))
        file.write(np.uint16(30).tobytes())
    dataset = open_indexed(prefix)
    assert dataset[2][4:7].tolist() == [0, 30, 0]
    assert len(dataset.tokens) == 3 * longest > 2**32


def test_an_empty_dataset_can_be_written_and_read(prefix):
    write_indexed(prefix, [])
    assert len(open_indexed(prefix)) == 0


def take_index_of(prefix: str, documents: list[np.ndarray]) -> None:
    write_indexed(f"{prefix}2", documents)
    os.replace(f"{prefix}2.idx", f"{prefix}.idx")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("damage", "expected"), [
    (lambda prefix: os.truncate(f"{prefix}.bin", 10), "cut short or belongs to another dataset"),
    (lambda prefix: os.truncate(f"{prefix}.idx", 80), "its header needs"),
    (lambda prefix: os.truncate(f"{prefix}.idx", 5), "bad header"),
    (lambda prefix: os.truncate(f"{prefix}.idx", 0), "bad header"),
    (lambda prefix: Path(f"{prefix}.idx").write_bytes(b"PK" + bytes(100)), "bad header"),
    (lambda prefix: os.remove(f"{prefix}.bin"), "no such file"),
    (lambda prefix: os.remove(f"{prefix}.idx"), "no such file"),
    (lambda prefix: take_index_of(prefix, DOCUMENTS[:3]), "another dataset"),
])
def test_damage_is_refused_by_name(prefix, impl, damage, expected):
    write_indexed(prefix, DOCUMENTS, impl)
    damage(prefix)
    with pytest.raises(DataError, match=expected) as caught:
        open_indexed(prefix)
    assert "proteins." in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("at", "value", "expected"), [
    (9, 2, "version 2"), (17, 7, "holds no token ids"), (17, 0, "holds no token ids"), (18, 9, "its header needs"),
    (34 + 12 * 3 + 8 * 4, 2, "do not cover"),
])
def test_a_bad_header_says_what_is_bad(prefix, at, value, expected):
    write_indexed(prefix, DOCUMENTS)
    index = bytearray(Path(f"{prefix}.idx").read_bytes())
    index[at] = value
    Path(f"{prefix}.idx").write_bytes(index)
    with pytest.raises(DataError, match=expected):
        open_indexed(prefix)


def test_an_open_dataset_holds_no_file_open_and_outlives_its_names(prefix):
    before = os.listdir("/dev/fd")
    write_indexed(prefix, [np.array([6, 7]), np.array([8])])
    indexed = open_indexed(str(prefix))
    sequence = indexed[1]
    del indexed
    for suffix in (".bin", ".idx"):
        os.unlink(f"{prefix}{suffix}")
    assert sequence.tolist() == [8] and len(os.listdir("/dev/fd")) == len(before)


@pytest.mark.parametrize("number, expected", [(24, "ulimit -n"), (13, "Permission denied")])
def test_a_file_that_cannot_be_opened_is_named(prefix, monkeypatch, number, expected):
    def refuse(path):
        raise OSError(number, os.strerror(number))
    write_indexed(prefix, [np.array([6, 7])])
    monkeypatch.setattr("megatron.data.corpus.indexed.mapped", refuse)
    with pytest.raises(DataError, match=rf"{prefix}.idx: cannot be read \(.*{expected}"):
        open_indexed(str(prefix))


def test_a_layout_other_than_the_asked_one_is_refused(prefix):
    write_indexed(prefix, DOCUMENTS, "cached")
    with pytest.raises(DataError, match="--data-impl mmap; use --data-impl infer"):
        open_indexed(prefix, "mmap")


def test_an_error_while_writing_leaves_nothing_behind(prefix, tmp_path):
    def failing():
        yield DOCUMENTS[0]
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        write_indexed(prefix, failing())
    assert not list(tmp_path.iterdir())


def test_a_second_writer_of_a_prefix_is_refused(prefix):
    with IndexedWriter(prefix), pytest.raises(DataError, match="another program is writing"):
        IndexedWriter(prefix)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_written_to_all_the_same(prefix, monkeypatch, number):
    def refuse(file, operation):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr("fcntl.flock", refuse)
    write_indexed(prefix, DOCUMENTS)
    assert len(open_indexed(prefix)) == 3


def test_a_last_step_that_fails_leaves_nothing_behind(prefix, tmp_path, monkeypatch):
    def refuse(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(IndexedWriter, "commit", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_indexed(prefix, DOCUMENTS)
    assert not list(tmp_path.iterdir())


def test_a_writer_goes_on_behind_what_was_committed(prefix):
    sizes, one = np.array([2]), np.array([1])
    writer = IndexedWriter(prefix)
    writer.add(np.array([6, 7]), sizes, one)
    mark = writer.commit()
    writer.add(np.array([8, 9]), sizes, one)
    writer.close()
    with IndexedWriter(prefix, resume_at=mark) as writer:
        writer.add(np.array([10, 11]), sizes, one)
    assert open_indexed(prefix).tokens.tolist() == [6, 7, 10, 11]


def test_a_writer_does_not_go_on_behind_what_was_lost(prefix):
    writer = IndexedWriter(prefix)
    writer.add(np.array([6, 7]), np.array([2]), np.array([1]))
    mark = writer.commit()
    os.truncate(writer.folder / "bin", 1)
    writer.close()
    with pytest.raises(DataError, match="has lost what an earlier run had written"):
        IndexedWriter(prefix, resume_at=mark)


def test_an_index_never_stands_beside_another_bin(prefix, monkeypatch):
    write_indexed(prefix, DOCUMENTS)
    renames = []

    def failing_replace(source, target):
        renames.append(str(target))
        assert not os.path.exists(f"{prefix}.idx"), "the old index must be gone before the new .bin comes"
        raise OSError("killed here")

    monkeypatch.setattr(os, "replace", failing_replace)
    with pytest.raises(OSError, match="killed here"):
        write_indexed(prefix, DOCUMENTS[:1])
    assert renames == [f"{prefix}.bin"]


@pytest.mark.parametrize(("given", "remedy"), [
    ("small", "did you mean small_text_document?"), ("smal_text_document", "did you mean small_text_document?"),
    ("pfam.fa.gz", "preprocess pfam.fa.gz first: python tools/preprocess_data.py --input pfam.fa.gz --output-prefix "
                   "pfam; then give pfam_text_document"),
    ("nothing", "a data path is the prefix of a .bin and an .idx file")])
def test_a_prefix_of_nothing_is_told_with_what_to_give(given, remedy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("small_text_document.idx", "small_text_document.bin", "pfam.fa.gz"):
        (tmp_path / name).touch()
    with pytest.raises(DataError) as raised:
        open_indexed(given)
    assert str(raised.value) == f"{given}.idx: no such file; {remedy}"
