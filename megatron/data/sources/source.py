"""A file of proteins, whatever its kind: which kind it is, its blocks, and the texts of a block."""

import glob
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from megatron.data.sources.block import Block, Texts
from megatron.data.sources.parquet import PARQUET_MAGIC, parquet_blocks, parse_parquet
from megatron.data.sources.streams import GZIP_MAGIC, ZSTD_MAGICS, InputStream, unpacked
from megatron.data.sources.tape_lmdb import LMDB_MAGIC, LMDB_MAGIC_OFFSET, lmdb_blocks, parse_lmdb
from megatron.data.sources.text import (
    parse_fasta,
    parse_json,
    parse_strings,
    place_in_fasta,
    place_in_json,
    place_in_strings,
    text_blocks,
)
from megatron.errors import DataError

_PARSERS = {"json": parse_json, "fasta": parse_fasta, "strings": parse_strings, "lmdb": parse_lmdb,
            "parquet": parse_parquet}
_PLACES = {"json": place_in_json, "fasta": place_in_fasta, "strings": place_in_strings}
_WITH_KEYS = ("json", "lmdb", "parquet")
_BinaryReader = Callable[[str, str, Sequence[str], str | None], Iterator[Block]]


class Source:
    """One input. `size` is its bytes (0 for standard input); `sha256` is known once its blocks have been read."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.sha256 = ""
        self._file = _file_of(path)
        self.size = 0 if path == "-" else os.path.getsize(self._file)

    def blocks(self, keys: Sequence[str], name_key: str | None = None) -> Iterator[Block]:
        """The blocks of whole records, in order; raises DataError for what cannot be read.

        `keys` are those of the texts; `name_key`, if given, that of the name.
        """
        kind = ""
        for block in self._blocks(keys, name_key):
            kind = kind or self._check_kind(block.kind, keys, name_key)
            yield block
        if not kind:
            raise DataError(f"{self.path}: holds no record")

    def identity(self) -> tuple[str, int, int]:
        """Path, size and time of the last change: tells whether an input is still the same."""
        return self.path, self.size, os.stat(self._file).st_mtime_ns

    def _blocks(self, keys: Sequence[str], name_key: str | None) -> Iterator[Block]:
        if os.path.isdir(self.path):
            yield from lmdb_blocks(self.path, self.path)
            self.sha256 = file_sha256(self._file)
            return
        stream = InputStream(self._file)
        try:
            is_packed = stream.peek(4).startswith((GZIP_MAGIC, *ZSTD_MAGICS))
            chunks = unpacked(stream)
            head = next(chunks, b"")
            while len(head) < LMDB_MAGIC_OFFSET + 4 and (more := next(chunks, b"")):
                head += more
            read_binary = _binary_reader(head)
            if read_binary is None:
                yield from text_blocks(stream, _chain(head, chunks))
                self.sha256 = stream.sha256()
            elif is_packed or not os.path.isfile(self._file):
                yield from self._spooled(read_binary, _chain(head, chunks), keys, name_key)
                self.sha256 = stream.sha256()
            else:
                yield from read_binary(self.path, self.path, keys, name_key)
                self.sha256 = file_sha256(self._file)
        finally:
            stream.close()

    def _spooled(self, read_binary: _BinaryReader, chunks: Iterable[bytes], keys: Sequence[str],
                 name_key: str | None) -> Iterator[Block]:
        """The blocks of a file that must be random-accessible, unpacked into a temporary one."""
        with tempfile.NamedTemporaryFile() as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            yield from read_binary(self.path, file.name, keys, name_key)

    def _check_kind(self, kind: str, keys: Sequence[str], name_key: str | None) -> str:
        if len(keys) > 1 and kind not in _WITH_KEYS:
            raise DataError(f"{self.path}: is {kind} with one text a record, but --json-keys names {len(keys)}")
        if name_key and kind not in (*_WITH_KEYS, "fasta"):
            raise DataError(f"{self.path}: is {kind}, one protein a line without a name; --names needs FASTA, JSON, "
                            "LMDB or Parquet")
        return kind


def expand(patterns: Sequence[str]) -> list[Source]:
    """A source for each path, in the order given; a pattern that is no path stands for its matches, sorted."""
    paths: list[str] = []
    for pattern in patterns:
        if pattern == "-" or os.path.exists(pattern):
            paths.append(pattern)
            continue
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise DataError(f"{pattern}: no such file; --input names files of proteins")
        paths += matches
    if paths.count("-") > 1:
        raise DataError("--input names standard input '-' twice; it can be read once")
    return [Source(path) for path in paths]


def texts_of(block: Block, key: str) -> Texts:
    """The text of each of a block's records; `key` names it where records have several."""
    return _PARSERS[block.kind](block, key)


def place_of(block: Block, index: int, offset: int) -> str:
    """Where byte `offset` of the text of record `index` stands, in words."""
    place = _PLACES.get(block.kind)
    return place(block, index, offset) if place else f"record {block.first + index}, column {offset + 1}"


def file_sha256(path: str) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def _file_of(path: str) -> str:
    if not os.path.isdir(path):
        return path
    file = Path(path) / "data.mdb"
    if not file.is_file():
        raise DataError(f"{path}: is a folder, and no LMDB (it has no data.mdb); --input names files of proteins")
    return str(file)


def _binary_reader(head: bytes) -> _BinaryReader | None:
    if head.startswith(PARQUET_MAGIC):
        return parquet_blocks
    if head.startswith(LMDB_MAGIC, LMDB_MAGIC_OFFSET):
        return lambda source, path, keys, name_key: lmdb_blocks(source, path)
    return None


def _chain(head: bytes, chunks: Iterable[bytes]) -> Iterator[bytes]:
    yield head
    yield from chunks
