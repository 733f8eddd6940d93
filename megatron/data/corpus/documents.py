"""Proteins as packing sees them: consecutive documents of a corpus, and the pieces that rows are made of."""

from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate

import numpy as np

from megatron.data.corpus.indexed import IndexedDataset
from megatron.data.corpus.joined import Corpus

CHUNK_DOCUMENTS = 1 << 20


class Documents:
    """A range of a corpus's documents, renumbered from 0. A document is one protein."""

    def __init__(self, corpus: Corpus, documents: range) -> None:
        self.indexed, self.range = corpus, documents
        self._starts = [0, *accumulate(part.num_documents for part in corpus.parts)]  # in the corpus

    def __len__(self) -> int:
        return len(self.range)

    def __reduce__(self) -> tuple:
        return type(self), (self.indexed, self.range)

    @cached_property
    def lengths(self) -> np.ndarray:
        """The number of residues of each document, [documents]; int32, or int64 if a length needs it.

        For a single file usually a view of the mapped index; for several files an array in memory.
        """
        lengths = []
        for part, start in zip(self.indexed.parts, self._starts, strict=False):
            own = range(max(0, self.range.start - start), min(part.num_documents, self.range.stop - start))
            lengths += [_lengths(part, own)] if own else []
        return lengths[0] if len(lengths) == 1 else np.concatenate([np.zeros(0, np.int32), *lengths])

    def read(self, document: int, offset: int, length: int) -> np.ndarray:
        """At most `length` token ids of a document, from `offset` on."""
        file, number = self._find(document)
        return file.document(number)[offset:offset + length]

    def place(self, document: int) -> tuple[str, int]:
        """The prefix of the indexed dataset that a document is in, and its number there."""
        file, number = self._find(document)
        return file.prefix, number

    def _find(self, document: int) -> tuple[IndexedDataset, int]:
        part = bisect_right(self._starts, self.range.start + document) - 1
        return self.indexed.parts[part], self.range.start + document - self._starts[part]


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


def _lengths(file: IndexedDataset, documents: range) -> np.ndarray:
    """The number of residues of each of some documents of one file.

    A view of the index (int32) if every document is one sequence, else sums in memory, int64 if one needs it.
    """
    if file.has_one_sequence_each:
        return file.sizes[documents.start:documents.stop]
    lengths = np.empty(len(documents), np.int32)
    for start in range(0, len(documents), CHUNK_DOCUMENTS):
        bounds = file.doc_idx[documents.start:documents.stop + 1][start:start + CHUNK_DOCUMENTS + 1]
        ends = np.cumsum(file.sizes[bounds[0]:bounds[-1]], dtype=np.int64)
        sums = np.diff(np.concatenate([[0], ends])[bounds - bounds[0]])
        if sums.max() > np.iinfo(lengths.dtype).max:
            lengths = lengths.astype(np.int64)
        lengths[start:start + len(sums)] = sums
    return lengths
