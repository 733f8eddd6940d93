"""Several indexed datasets as one, without copying them: to training, what tools/merge_datasets.py makes of them."""

from functools import cached_property
from typing import Any

from megatron.data.corpus.indexed import IndexedDataset, contents_of, identity_of, open_indexed


class JoinedDataset:
    """The documents of `parts`, one dataset behind the other. Reopened when it is pickled.

    prefix: a name for all of them, by whose folder caches lie. Its identity is that of the merged files.
    """

    def __init__(self, prefix: str, parts: tuple[IndexedDataset, ...]) -> None:
        self.prefix, self.parts = prefix, parts

    def __reduce__(self) -> tuple[Any, ...]:
        return open_corpus, (self.prefix, tuple(part.prefix for part in self.parts), self.parts[0].impl)

    @property
    def num_documents(self) -> int:
        """How many documents there are, empty ones included."""
        return sum(part.num_documents for part in self.parts)

    @cached_property
    def identity(self) -> str:
        """As `IndexedDataset` has it."""
        return identity_of(self.parts)

    def contents(self) -> str:
        """As `IndexedDataset` has it."""
        return contents_of(self.parts, self.identity)


Corpus = IndexedDataset | JoinedDataset


def open_corpus(name: str, prefixes: tuple[str, ...], impl: str = "infer") -> Corpus:
    """The datasets of `prefixes` as one, called `name` where there are several; raises DataError."""
    parts = tuple(open_indexed(prefix, impl) for prefix in prefixes)
    return parts[0] if len(parts) == 1 else JoinedDataset(name, parts)
