"""A corpus: one indexed dataset, or several concatenated without copying, equivalent to tools/merge_datasets.py."""

import hashlib
from functools import cached_property
from typing import Any

import numpy as np

from megatron.data.corpus.indexed import IndexedDataset, open_indexed

PROBES, IDS_A_PROBE = 64, 1024


class Corpus:
    """The documents of the datasets `parts`, in order. Unpickling opens the files again.

    prefix: a path that names the corpus; its caches go into that path's folder.
    """

    def __init__(self, prefix: str, parts: tuple[IndexedDataset, ...]) -> None:
        self.prefix, self.parts = prefix, parts

    def __reduce__(self) -> tuple[Any, ...]:
        return open_corpus, (self.prefix, tuple(part.prefix for part in self.parts), self.parts[0].impl)

    @property
    def num_documents(self) -> int:
        """The number of documents, including empty ones."""
        return sum(part.num_documents for part in self.parts)

    @cached_property
    def identity(self) -> str:
        """A digest of dtype, sizes, documents and the size of the .bin, for the keys of caches.

        It is that of the merged dataset, whether the corpus has one part or several.
        """
        num_bytes, num_sequences = sum(part.tokens.nbytes for part in self.parts), sum(map(len, self.parts))
        digest = hashlib.sha256(f"{self.parts[0].dtype.str} {num_bytes} {num_sequences}".encode())
        for part in self.parts:
            digest.update(np.ascontiguousarray(part.sizes).data)
        digest.update(np.zeros(1, dtype=np.int64).data)
        before = 0
        for part in self.parts:
            ends = part.doc_idx[1:]
            digest.update(np.ascontiguousarray(ends + before if before else ends).data)
            before += len(part)
        return digest.hexdigest()[:32]

    @cached_property
    def contents(self) -> str:
        """A digest of `identity` and samples of the ids, which also tells apart data of the same lengths."""
        digest = hashlib.sha256(self.identity.encode())
        num_tokens = sum(len(part.tokens) for part in self.parts)
        for start in np.linspace(0, max(0, num_tokens - IDS_A_PROBE), PROBES, dtype=np.int64).tolist():
            for part in self.parts:
                if start < len(part.tokens) and start + IDS_A_PROBE > 0:
                    ids = part.tokens[max(0, start):start + IDS_A_PROBE]
                    digest.update(np.ascontiguousarray(ids).data)
                start -= len(part.tokens)
        return digest.hexdigest()[:32]


def open_corpus(name: str, prefixes: tuple[str, ...], impl: str = "infer") -> Corpus:
    """The corpus made of the datasets `prefixes`, with `name` as its prefix; raises DataError."""
    return Corpus(name, tuple(open_indexed(prefix, impl) for prefix in prefixes))
