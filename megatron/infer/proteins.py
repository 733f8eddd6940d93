"""The proteins of files, each with its name, in order: what every reader of preprocessing takes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.corpus.tokenizer import ResidueTokenizer
from megatron.data.corpus.vocab import Vocab
from megatron.data.preprocess.encode import Encoding, encode_block
from megatron.data.sources.names import DEFAULT_NAME_KEY
from megatron.data.sources.source import expand
from megatron.errors import DataError

_NAMED = "fasta"  # the kind whose records have names that need no key


@dataclass(frozen=True)
class Protein:
    """`name`: the first word of its header, or what stands under the key of names, else its number from 1."""

    name: str
    residues: np.ndarray  # ids, uint8

    def __len__(self) -> int:
        return len(self.residues)


class ProteinFiles:
    """Files, folders or patterns of them, read again at each pass.

    `key`: of the texts where records have several; `name_key`: of the names there. Raises DataError for a file that
    cannot be read, and while it is read for a record that is no protein, and for one without residues.
    """

    def __init__(self, paths: Sequence[str], key: str, name_key: str | None, vocab: Vocab) -> None:
        if "-" in paths:
            raise DataError("standard input cannot be read twice, as is needed here; give a file")
        self._sources, self._key, self._name_key = expand(paths), key, name_key
        self._tokenizer = ResidueTokenizer(vocab)

    def __iter__(self) -> Iterator[Protein]:
        number = 0
        for source in self._sources:
            for block in source.blocks((self._key,), self._name_key):
                has_names = self._name_key is not None or block.kind == _NAMED
                name_key = (self._name_key or DEFAULT_NAME_KEY) if has_names else None
                encoding = Encoding((self._key,), self._tokenizer, unknown=b"", name_key=name_key,
                                    remedy="mend it, or leave it out")
                (documents,) = encode_block(encoding, block)
                names = [name.decode(errors="surrogateescape") for name in documents.names.splitlines()]
                ends = np.cumsum(documents.lengths())[:-1]
                for index, residues in enumerate(np.split(np.frombuffer(documents.ids, np.uint8), ends)):
                    number += 1
                    name = names[index] if has_names else str(number)
                    if not len(residues):
                        raise DataError(f"{block.source}: protein {number}, {name}, has no residue; leave it out")
                    yield Protein(name, residues)

    def identity(self) -> list[Any]:
        """Tells whether they are still the same: the keys, and path, size and time of the last change of each file."""
        return [self._key, self._name_key, *(facts for source in self._sources for facts in source.identity())]

    def have(self, path: Path) -> bool:
        """Whether that is one of the files."""
        return any(path.samefile(file) for source in self._sources for file, *_ in source.identity())


def file_name(name: str) -> str:
    """A protein's name as a file or a key of HDF5 can have it; raises DataError for one that is not UTF-8 text."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(f"the name {name.encode(errors='surrogateescape')!r} is not UTF-8 text; rename that protein, "
                        "or write the file in UTF-8") from None
    return name.replace("/", "_")
