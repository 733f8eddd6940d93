"""Proteins as packing sees them: consecutive documents of a corpus, and the pieces that rows are made of."""

from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from megatron.data.corpus.indexed import IndexedDataset
from megatron.data.corpus.joined import Corpus

CHUNK_DOCUMENTS = 1 << 20


class Documents:
    """A range of a corpus's documents, renumbered from 0. A document is one protein."""

    def __init__(self, corpus: Corpus, documents: range) -> None:
        self.indexed, self.range = corpus, documents
        self._parts, self._starts, start = list[_OfOneFile](), list[int](), -documents.start
        for part in corpus.parts:
            own = range(max(0, -start), min(part.num_documents, len(documents) - start))
            if own:
                self._parts.append(_OfOneFile(part, own))
                self._starts.append(start + own.start)
            start += part.num_documents

    def __len__(self) -> int:
        return len(self.range)

    def __reduce__(self) -> tuple:
        return type(self), (self.indexed, self.range)

    @cached_property
    def lengths(self) -> np.ndarray:
        """The number of residues of each document, [documents]; int32, or int64 if a length needs it.

        For a single file usually a view of the mapped index; for several files an array in memory.
        """
        lengths = [part.lengths for part in self._parts]
        return lengths[0] if len(lengths) == 1 else np.concatenate([np.zeros(0, np.int32), *lengths])

    def read(self, document: int, offset: int, length: int) -> np.ndarray:
        """At most `length` token ids of a document, from `offset` on."""
        part = bisect_right(self._starts, document) - 1
        return self._parts[part].read(document - self._starts[part], offset, length)

    def place(self, document: int) -> tuple[str, int]:
        """The prefix of the indexed dataset that a document is in, and its number there."""
        part = bisect_right(self._starts, document) - 1
        return self._parts[part].place(document - self._starts[part])


class Pieces:
    """The pieces that rows are made of: whole proteins, and with `split` the parts of proteins longer than a row.

    Piece p < number of documents is document p, or its first part; the further parts of long ones have the numbers
    after that.
    """

    def __init__(self, documents: Documents, max_residues: int, long_proteins: str) -> None:
        self.max_residues = max_residues  # that fit into a row beside the protein's special tokens
        self.lengths = documents.lengths  # in residues; a piece longer than a row will be cropped or dropped
        self.num_documents = len(documents)
        self.num_empty = sum(int(np.count_nonzero(part == 0)) for _, part in chunks(self.lengths))
        long = np.concatenate([np.zeros(0, np.int64), *(start + np.flatnonzero(part > max_residues)
                                                        for start, part in chunks(self.lengths))])
        self.num_long = len(long)
        self._documents, self._offsets = long[:0], long[:0]
        if long_proteins == "split" and self.num_long:
            self._split(long)

    def locate(self, piece: int) -> tuple[int, int]:
        """The document of a piece, and the offset in it at which the piece begins."""
        if piece < self.num_documents:
            return piece, 0
        further = piece - self.num_documents
        return int(self._documents[further]), int(self._offsets[further])

    def of_documents(self, documents: np.ndarray) -> np.ndarray:
        """The numbers of all pieces of some documents."""
        chosen = np.zeros(self.num_documents, dtype=bool)
        chosen[documents] = True
        return np.concatenate([documents, self.num_documents + np.flatnonzero(chosen[self._documents])])

    def _split(self, long: np.ndarray) -> None:
        """Cut the documents `long` into parts of `max_residues`, the last of which may be shorter."""
        num_further = (self.lengths[long].astype(np.int64) - 1) // self.max_residues
        self._documents = np.repeat(long, num_further)
        before = np.repeat(np.cumsum(num_further) - num_further, num_further)
        self._offsets = (np.arange(len(self._documents)) - before + 1) * self.max_residues
        further_lengths = np.minimum(self.lengths[self._documents] - self._offsets, self.max_residues)
        self.lengths = np.concatenate([self.lengths, further_lengths.astype(self.lengths.dtype)])
        self.lengths[long] = self.max_residues


def chunks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The parts of an array of documents, each with where it starts: what is made of a part takes little memory."""
    for start in range(0, len(array), CHUNK_DOCUMENTS):
        yield start, array[start:start + CHUNK_DOCUMENTS]


class _OfOneFile:
    """A range of the documents of one indexed dataset."""

    def __init__(self, file: IndexedDataset, documents: range) -> None:
        self._file, self.range = file, documents

    @cached_property
    def lengths(self) -> np.ndarray:
        """The number of residues of each document, [documents].

        A view of the index (int32) if every document is one sequence, else sums in memory, int64 if one needs it.
        """
        if self._first_sequence is not None:
            return self._file.sizes[self._first_sequence:self._first_sequence + len(self.range)]
        lengths = np.empty(len(self.range), np.int32)
        for start in range(0, len(self.range), CHUNK_DOCUMENTS):
            bounds = self._file.doc_idx[self.range.start:self.range.stop + 1][start:start + CHUNK_DOCUMENTS + 1]
            ends = np.cumsum(self._file.sizes[bounds[0]:bounds[-1]], dtype=np.int64)
            sums = np.diff(np.concatenate([[0], ends])[bounds - bounds[0]])
            if sums.max() > np.iinfo(lengths.dtype).max:
                lengths = lengths.astype(np.int64)
            lengths[start:start + len(sums)] = sums
        return lengths

    def read(self, document: int, offset: int, length: int) -> np.ndarray:
        """At most `length` token ids of a document from `offset` on; several sequences of it are concatenated."""
        if self._first_sequence is not None:
            return self._file[self._first_sequence + document][offset:offset + length]
        first, last = self._file.doc_idx[self.range.start + document:self.range.start + document + 2].tolist()
        whole = [self._file.tokens[:0], *(self._file[sequence] for sequence in range(first, last))]
        return np.concatenate(whole)[offset:offset + length]

    def place(self, document: int) -> tuple[str, int]:
        """The prefix of the dataset, and the document's number there."""
        return self._file.prefix, self.range[document]

    @cached_property
    def _first_sequence(self) -> int | None:
        """The number of the first document's sequence if every document is one sequence, else None."""
        bounds = self._file.doc_idx
        for start in range(self.range.start, self.range.stop, CHUNK_DOCUMENTS):
            stop = min(start + CHUNK_DOCUMENTS, self.range.stop)
            if not np.all(np.diff(bounds[start:stop + 1]) == 1):
                return None
        return int(bounds[self.range.start])
