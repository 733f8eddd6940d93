"""An input of proteins, a file or a folder: gives its blocks, and the texts, names and records in a block."""

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megatron.data.sources.block import SEQUENCE_KEY, BadRecord, RecordBlock, Texts, WantedKeys, type_name
from megatron.data.sources.folders import files_of
from megatron.data.sources.kinds import FORMATS, blocks_of
from megatron.data.sources.streams import InputStream
from megatron.errors import DataError


class Source:
    """One input.

    `size`: in bytes, 0 for standard input; `is_of_files`: whether it can be read again, unlike a pipe. Once its blocks
    have been read: `sha256`, over all its files in order, and `kinds`, those of its blocks.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.sha256 = ""
        self.kinds: set[str] = set()
        self._files = files_of(path)
        self.size = 0 if path == "-" else sum(map(os.path.getsize, self._files))
        self.is_of_files = path != "-" and all(map(os.path.isfile, self._files))

    def blocks(self, keys: Sequence[str] = (), name_key: str | None = None) -> Iterator[RecordBlock]:
        """The blocks of whole records, in order; raises DataError if a file cannot be read.

        `keys`: of the texts, empty for whole records (`records_of`); `name_key`: of the name, if wanted.
        """
        digest = hashlib.sha256()
        bytes_before = 0
        for file in self._files:
            stream = InputStream(file, digest=digest)
            try:
                path = file if file != "-" and os.path.isfile(file) else None
                for block in blocks_of(stream, path, WantedKeys(tuple(keys), name_key)):
                    self.kinds.add(block.kind)
                    yield replace(block, bytes_read=bytes_before + block.bytes_read)
                stream.drain()
            finally:
                stream.close()
            bytes_before += stream.bytes_read
        if not self.kinds:
            raise DataError(f"{self.path}: holds no record")
        self.sha256 = digest.hexdigest()

    def identity(self) -> list[tuple[str, int, int]]:
        """Path, size and modification time (ns) of each file, to tell whether the input has changed."""
        return [(file, os.path.getsize(file), os.stat(file).st_mtime_ns) for file in self._files]


def expand(patterns: Sequence[str]) -> list[Source]:
    """A source for each path, in the order given; a pattern that is no path gives its matches, sorted.

    Raises DataError for a pattern without matches, and if standard input is named twice.
    """
    paths: list[str] = []
    for pattern in patterns:
        if pattern == "-" or os.path.exists(pattern):
            paths.append(pattern)
            continue
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise DataError(f"{pattern}: no such file; give files of proteins")
        paths += matches
    if paths.count("-") > 1:
        raise DataError("standard input '-' is named twice; it can be read once")
    return [Source(path) for path in paths]


def texts_of(block: RecordBlock, key: str) -> Texts:
    """The text of each record in a block; `key`: that of the text, for kinds with keys."""
    return FORMATS[block.kind].texts(block, key)


def records_of(block: RecordBlock) -> Iterator[tuple[str, dict[str, Any] | BadRecord]]:
    """Each record of a block that was read without keys: its place, such as "line 3", and its values by key.

    Values are as in the file: text for CSV and TSV, also arrays for LMDB. FASTA has the keys `id` and `sequence`, one
    protein a line has `sequence`. A BadRecord takes the place of the values of a record that has none. Raises DataError
    if the block is not of its kind.
    """
    form = FORMATS[block.kind]
    if not form.has_keys:
        texts_of(block, SEQUENCE_KEY)  # raises if it is not of that kind
    for number, record in form.records(block):
        if not isinstance(record, dict | BadRecord):
            record = BadRecord("bad JSON", f"{type_name(record)} where a JSON object belongs")
        yield f"{form.unit} {number}", record


def names_of(block: RecordBlock, key: str) -> Texts:
    """The name of each record in a block: the first word under `key`, or of a FASTA header; a record without is bad.

    Names are bytes that are not decoded, so they may hold anything but white space.
    """
    finding = "a header without a name" if block.kind == "fasta" else f"no name under {key!r}; --name-key names the key"
    form, parsed = FORMATS[block.kind], Texts([])
    found = form.names(block, key) if form.names else (
        (number, _under_key(record, key)) for number, record in form.records(block))
    for index, (number, text) in enumerate(found):
        name = b"" if isinstance(text, BadRecord) else b"".join(text.split(None, 1)[:1])
        if not name:
            parsed.bad[index] = BadRecord("no name", f"{block.source}: {form.unit} {number}: {finding}")
        parsed.texts.append(name)
    return parsed


def _under_key(record: Any, key: str) -> bytes:
    """The value under `key` of a record as bytes; b"" if it is missing, or not text or an integer."""
    value = record.get(key) if isinstance(record, dict) else None
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str):
        value = value.encode(errors="surrogatepass")
    return value if isinstance(value, bytes) else b""


def place_of(block: RecordBlock, index: int, offset: int) -> str:
    """The place of byte `offset` in the text of record `index`, for messages, such as "line 3, column 7"."""
    place = FORMATS[block.kind].place
    return place(block, index, offset) if place else f"record {block.first + index}, column {offset + 1}"
