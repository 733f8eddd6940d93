"""An input of proteins, a file or a folder: its blocks, and the texts, names and places of a block."""

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megatron.data.sources.block import BadRecord, RecordBlock, Texts, Wanted, type_name
from megatron.data.sources.folders import files_of
from megatron.data.sources.kinds import FORMATS, blocks_of
from megatron.data.sources.streams import InputStream
from megatron.data.sources.values import SEQUENCE_KEY
from megatron.errors import DataError


class Source:
    """One input. `size` is its bytes (0 for standard input). is_of_files: can it be read again, unlike a pipe?

    Known once its blocks have been read: `sha256`, over the files of a folder in order, and `kinds` of its blocks.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.sha256 = ""
        self.kinds: set[str] = set()
        self._files = files_of(path)
        self.size = 0 if path == "-" else sum(map(os.path.getsize, self._files))
        self.is_of_files = path != "-" and all(map(os.path.isfile, self._files))

    def blocks(self, keys: Sequence[str] = (), name_key: str | None = None) -> Iterator[RecordBlock]:
        """The blocks of whole records, in order; raises DataError for what cannot be read.

        `keys` are those of the texts; `name_key`, if given, that of the name. `records_of` takes blocks without keys.
        """
        digest = hashlib.sha256()
        bytes_before = 0
        for file in self._files:
            stream = InputStream(file, digest=digest)
            try:
                path = file if file != "-" and os.path.isfile(file) else None
                for block in blocks_of(stream, path, Wanted(tuple(keys), name_key)):
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
        """Path, size and time of the last change of each file: tells whether an input is still the same."""
        return [(file, os.path.getsize(file), os.stat(file).st_mtime_ns) for file in self._files]


def expand(patterns: Sequence[str]) -> list[Source]:
    """A source for each path, in the order given; a pattern that is no path stands for its matches, sorted."""
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
    """The text of each of a block's records; `key` names it where records have several."""
    return FORMATS[block.kind].texts(block, key)


def records_of(block: RecordBlock) -> Iterator[tuple[str, dict[str, Any] | BadRecord]]:
    """The place, in words, and all values by key of each of a block's records, read without keys, or what it has not.

    Values are as the file has them: of CSV and TSV text, of LMDB also arrays. FASTA has `id` and `sequence`, one
    protein a line `sequence`. Raises DataError for what is none of the block's kind.
    """
    if not FORMATS[block.kind].has_keys:
        texts_of(block, SEQUENCE_KEY)  # raises for what is none of that kind
    for place, record in FORMATS[block.kind].records(block):
        if not isinstance(record, dict | BadRecord):
            record = BadRecord("bad JSON", f"{type_name(record)} where a JSON object belongs")
        yield place, record


def names_of(block: RecordBlock, key: str) -> Texts:
    """The name of each of a block's records, its first word under `key`; a record without one is bad.

    Bytes are taken as they are, so a name may hold anything but white space.
    """
    finding = "a header without a name" if block.kind == "fasta" else f"no name under {key!r}; --name-key names the key"
    form, parsed = FORMATS[block.kind], Texts([])
    found = form.names(block, key) if form.names else (
        (place, _under_key(record, key)) for place, record in form.records(block))
    for index, (place, text) in enumerate(found):
        name = b"".join(text.split(None, 1)[:1])
        if not name:
            parsed.bad[index] = BadRecord("no name", f"{block.source}: {place}: {finding}")
        parsed.texts.append(name)
    return parsed


def _under_key(record: Any, key: str) -> bytes:
    value = record.get(key) if isinstance(record, dict) else None
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str):
        value = value.encode(errors="surrogatepass")
    return value if isinstance(value, bytes) else b""


def place_of(block: RecordBlock, index: int, offset: int) -> str:
    """Where byte `offset` of the text of record `index` stands, in words."""
    place = FORMATS[block.kind].place
    return place(block, index, offset) if place else f"record {block.first + index}, column {offset + 1}"
