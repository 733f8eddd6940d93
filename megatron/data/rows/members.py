"""Lists the proteins in given rows: their numbers in the corpus, and their names if PREFIX.names exists."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from megatron.data.corpus.documents import Documents
from megatron.data.rows.blend import BlendedDataset, place_in_blend
from megatron.data.rows.dataset import Dataset
from megatron.data.rows.packed import PackedDataset


@dataclass(frozen=True)
class Member:
    """A protein, or a part of one, in row number `sample` of a run.

    `document`: its number in the dataset `prefix`; `name`: from PREFIX.names, else empty; `num_residues`: of the whole
    protein.
    """

    sample: int
    prefix: str
    document: int
    name: str
    num_residues: int


def members_of(dataset: Dataset, samples: Sequence[int]) -> list[Member]:
    """The proteins in the rows `samples` of a dataset, in that order."""
    found = [(sample, *documents.place(document), int(documents.lengths[document])) for sample in samples
             for documents, document in _documents_of(dataset, sample)]
    numbers = defaultdict[str, set[int]](set)
    for _, prefix, number, _ in found:
        numbers[prefix].add(number)
    names = {prefix: names_of(prefix, those) for prefix, those in numbers.items()}
    return [Member(sample, prefix, number, names[prefix].get(number, ""), size)
            for sample, prefix, number, size in found]


def names_of(prefix: str, documents: set[int]) -> dict[int, str]:
    """The names of some documents by number, as far as PREFIX.names has them; the file is read up to the last one."""
    path = Path(f"{prefix}.names")
    if not documents or not path.is_file():
        return {}
    with path.open(encoding="utf-8", errors="replace") as file:
        lines = islice(file, max(documents) + 1)
        return {number: line.rstrip("\r\n") for number, line in enumerate(lines) if number in documents}


def _documents_of(dataset: Dataset, sample: int) -> Iterator[tuple[Documents, int]]:
    """Each protein of a row: its corpus's documents, and its number there."""
    corpus, index = dataset, sample
    if isinstance(dataset, BlendedDataset):
        number, index = place_in_blend(dataset.weights, sample)
        corpus = dataset.datasets[number]
    assert isinstance(corpus, PackedDataset)
    epoch, row = corpus.locate(index)
    for piece in corpus.rows(epoch).row(row).tolist():
        yield corpus.documents, corpus.pieces.locate(piece)[0]
