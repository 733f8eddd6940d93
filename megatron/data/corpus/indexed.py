"""Reads Megatron's indexed datasets: PREFIX.bin holds all token ids, PREFIX.idx where sequences and documents begin.

The .idx has one of two layouts, both little-endian: MMIDIDX ("mmap") or TNTIDX ("cached" and "lazy", which differ only
in whether the .bin is read into memory at the start or mapped). A document is one or more consecutive sequences, mostly
one.
"""

import os
from dataclasses import dataclass
from difflib import get_close_matches
from errno import EMFILE
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.corpus.mapping import mapped
from megatron.errors import DataError

MMAP_MAGIC = b"MMIDIDX\x00\x00"
TNT_MAGIC = b"TNTIDX\x00\x00"
IMPLEMENTATIONS = ("mmap", "cached", "lazy")
DTYPES: dict[int, type[np.integer]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
MMAP_HEADER_BYTES = 34
TNT_HEADER_BYTES = 56
_CHUNK_ITEMS = 1 << 20


@dataclass(frozen=True)
class Index:
    """The content of an .idx file; the arrays are views of the mapped file if its layout allows.

    `pointers`: where each sequence starts in the .bin, in units of 1/`pointers_per_token` tokens. The other arrays are
    as in `IndexedDataset`.
    """

    layout: str
    dtype: np.dtype
    sizes: np.ndarray
    pointers: np.ndarray
    pointers_per_token: int
    doc_idx: np.ndarray


class IndexedDataset:
    """The sequences of one indexed dataset: `dataset[i]` is the array of the ids of sequence i.

    With n sequences and d documents, sizes: int32 [n], the tokens of each sequence. doc_idx: int64 [d+1], the first
    sequence of each document, and n. tokens: all ids in one flat array. layout: of the .idx, mmap or tnt. Unpickling
    opens the files again.
    """

    def __init__(self, prefix: str, impl: str, index: Index, tokens: np.ndarray) -> None:
        self.prefix, self.impl = prefix, impl
        self.layout, self.dtype = index.layout, index.dtype
        self.sizes, self.doc_idx, self.tokens = index.sizes, index.doc_idx, tokens
        self._pointers, self._pointers_per_token = index.pointers, index.pointers_per_token

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> np.ndarray:
        start = int(self._pointers[i]) // self._pointers_per_token
        return self.tokens[start:start + int(self.sizes[i])]

    def __reduce__(self) -> tuple[Any, ...]:
        return open_indexed, (self.prefix, self.impl)

    @property
    def num_documents(self) -> int:
        """The number of documents, including empty ones."""
        return len(self.doc_idx) - 1

    @cached_property
    def has_one_sequence_each(self) -> bool:
        """Whether every document is one sequence, which then has its number."""
        return len(self) == self.num_documents and all(
            np.all(np.diff(self.doc_idx[start:start + _CHUNK_ITEMS + 1]) == 1)
            for start in range(0, self.num_documents, _CHUNK_ITEMS))

    def document(self, number: int) -> np.ndarray:
        """The ids of a document; several sequences of it are concatenated."""
        if self.has_one_sequence_each:
            return self[number]
        first, last = self.doc_idx[number:number + 2].tolist()
        return np.concatenate([self.tokens[:0], *(self[sequence] for sequence in range(first, last))])


def open_indexed(prefix: str, impl: str = "infer") -> IndexedDataset:
    """The dataset of PREFIX.bin and PREFIX.idx; raises DataError if they are missing, damaged or do not fit together.

    `impl`: "cached" reads the whole .bin into memory, the others map it; "infer" accepts either layout.
    """
    if impl not in ("infer", *IMPLEMENTATIONS):
        raise DataError(f"--data-impl is {impl}; it must be infer, {', '.join(IMPLEMENTATIONS)}")
    index_path, bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index_path, bin_path):
        if not path.is_file():
            raise DataError(f"{path}: no such file; {_remedy(prefix)}")
    index = _read_index(index_path)
    if impl != "infer" and (impl == "mmap") != (index.layout == "mmap"):
        raise DataError(f"{index_path}: it is not in the layout of --data-impl {impl}; use --data-impl infer")
    _check_pair(index_path, bin_path, index)
    return IndexedDataset(str(prefix), impl, index, _read(bin_path, in_memory=impl == "cached").view(index.dtype))


def _remedy(prefix: str) -> str:
    """Advice for a prefix that has no dataset: to preprocess a file of proteins, or a prefix with a similar name."""
    given = Path(prefix)
    if given.is_file():
        stem = given.with_name(given.name.split(".")[0])
        return (f"preprocess {prefix} first: python tools/preprocess_data.py --input {prefix} --output-prefix {stem}; "
                f"then give {stem}_text_document")
    there = sorted(path.stem for path in given.parent.glob("*.idx"))
    near = [name for name in there if name.startswith(f"{given.name}_")] or get_close_matches(given.name, there, n=1)
    return (f"did you mean {given.with_name(near[0])}?" if near else
            "a data path is the prefix of a .bin and an .idx file")


def _read(path: Path, in_memory: bool = False) -> np.ndarray:
    """The bytes of a file, uint8, read or mapped; raises DataError."""
    try:
        return np.fromfile(path, dtype=np.uint8) if in_memory else mapped(path)
    except OSError as error:
        remedy = "raise the limit of open files (ulimit -n)" if error.errno == EMFILE else "is it yours to read?"
        raise DataError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error


def _read_index(path: Path) -> Index:
    """The content of an .idx of either layout; raises DataError if it is damaged."""
    raw = _read(path)
    head = raw[:TNT_HEADER_BYTES].tobytes()
    if head.startswith(MMAP_MAGIC) and len(raw) >= MMAP_HEADER_BYTES:
        index = _read_mmap_index(path, raw, head)
    elif head.startswith(TNT_MAGIC) and len(raw) >= TNT_HEADER_BYTES:
        index = _read_tnt_index(path, raw, head)
    else:
        raise DataError(f"{path}: bad header; an .idx file starts with MMIDIDX or TNTIDX. Preprocess the data again")
    documents = index.doc_idx
    if len(documents) == 0 or documents[0] != 0 or documents[-1] != len(index.sizes):
        raise DataError(f"{path}: its documents do not cover its {len(index.sizes)} sequences; it is damaged")
    return index


def _read_mmap_index(path: Path, raw: np.ndarray, head: bytes) -> Index:
    version, code = int.from_bytes(head[9:17], "little"), head[17]
    num_sequences, num_entries = (int.from_bytes(head[at:at + 8], "little") for at in (18, 26))
    dtype = _dtype(path, version, code)
    _check_length(path, len(raw), MMAP_HEADER_BYTES + 12 * num_sequences + 8 * num_entries)
    at = MMAP_HEADER_BYTES
    sizes = np.frombuffer(raw, np.int32, num_sequences, at)
    pointers = np.frombuffer(raw, np.int64, num_sequences, at + 4 * num_sequences)
    doc_idx = np.frombuffer(raw, np.int64, num_entries, at + 12 * num_sequences)
    return Index("mmap", dtype, sizes, pointers, dtype.itemsize, doc_idx)


def _read_tnt_index(path: Path, raw: np.ndarray, head: bytes) -> Index:
    version, code, item_size, num_items, num_sequences, num_entries = np.frombuffer(head, np.uint64, 6, 8).tolist()
    dtype = _dtype(path, version, code)
    if item_size != dtype.itemsize or num_items != num_sequences:
        raise DataError(f"{path}: bad header (item size {item_size}, {num_items} items, {num_sequences} sizes)")
    _check_length(path, len(raw), TNT_HEADER_BYTES + 8 * (3 * num_sequences + 2 + num_entries))
    at = TNT_HEADER_BYTES + 8 * (num_sequences + 1)
    pointers = np.frombuffer(raw, np.int64, num_sequences + 1, at)[:-1]
    sizes = np.frombuffer(raw, np.int64, num_sequences, at + 8 * (num_sequences + 1)).astype(np.int32)
    doc_idx = np.frombuffer(raw, np.int64, num_entries, at + 8 * (2 * num_sequences + 1))
    return Index("tnt", dtype, sizes, pointers, 1, doc_idx)


def _dtype(path: Path, version: int, code: int) -> np.dtype:
    if version != 1:
        raise DataError(f"{path}: bad header (version {version}; version 1 is known)")
    if code not in DTYPES:
        raise DataError(f"{path}: bad header (data type {code}, which holds no token ids)")
    return np.dtype(DTYPES[code])


def _check_length(path: Path, found: int, expected: int) -> None:
    """Raises DataError unless an .idx has the number of bytes that follows from its header."""
    if found != expected:
        raise DataError(f"{path}: {found} bytes where its header needs {expected}; it is damaged or cut short. "
                        "Copy or preprocess it again")


def _check_pair(index_path: Path, bin_path: Path, index: Index) -> None:
    """Raises DataError unless the .bin has the number of bytes that follows from its .idx."""
    expected = 0
    if len(index.sizes):
        start = int(index.pointers[-1]) // index.pointers_per_token
        expected = (start + int(index.sizes[-1])) * index.dtype.itemsize
    found = os.path.getsize(bin_path)
    if found != expected:
        raise DataError(f"{bin_path}: {found} bytes, but {index_path.name} describes {expected}: it is cut short or "
                        "belongs to another dataset. Copy or preprocess both again")
