"""Reads the proteins of files in order, each with its name, in every format that preprocessing reads."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.corpus.tokenizer import ResidueTokenizer
from megatron.data.corpus.vocab import Vocab
from megatron.data.preprocess.encode import Encoding, encode_block
from megatron.data.sources.block import DEFAULT_NAME_KEY
from megatron.data.sources.source import expand
from megatron.errors import DataError
from megatron.infer.skipped import FLAG, REMEDY, Skipped
from megatron.log import Log

_DIGEST_BYTES = 16
_NAMED = "fasta"  # the kind whose records have names that need no key


@dataclass(frozen=True)
class Protein:
    """A protein. `name`: the first word of its FASTA header, or the value under the name key, or else its number from
    1.
    """

    name: str
    residues: np.ndarray  # ids, uint8

    def __len__(self) -> int:
        return len(self.residues)


class ProteinFiles:
    """The proteins of files, folders or patterns; each iteration reads them again.

    `key`, `name_key`: key or column of the sequence, and of the name, for records that have several. `are_named_apart`:
    two proteins of one name are an error. `skips`: leave out bad records (not a protein, no residues, a name seen
    before) instead of raising DataError for the first; None in programs that have no flag for this. Raises DataError
    for a file that cannot be read.
    """

    def __init__(self, paths: Sequence[str], key: str, name_key: str | None, vocab: Vocab, *,
                 skips: bool | None = None, are_named_apart: bool = False) -> None:
        if "-" in paths:
            raise DataError("standard input cannot be read twice, as is needed here; give a file")
        self._paths, self._sources, self._key, self._name_key = paths, expand(paths), key, name_key
        self._tokenizer, self._skips, self._are_named_apart = ResidueTokenizer(vocab), bool(skips), are_named_apart
        self._remedy = "mend it, or leave it out" if skips is None else REMEDY
        self._skipped = Skipped()

    def __iter__(self) -> Iterator[Protein]:
        self._skipped, numbers_of = Skipped(), dict[bytes, int]()
        for number, file, protein in self._read():
            reason, finding = self._fault(number, protein, numbers_of)
            if not reason:
                self._skipped.num_left += 1
                yield protein
            elif self._skips:
                self._skipped.add(reason, f"{file}: {finding}")
            else:
                raise DataError(f"{file}: {finding}; {self._remedy}")

    def tell_skipped(self, log: Log) -> None:
        """Log what the last iteration left out; raises DataError if no protein was left."""
        self._skipped.tell(", ".join(self._paths), log)

    def _read(self) -> Iterator[tuple[int, str, Protein]]:
        """Each record that consists of residues, with its number from 1 and its file; it may still have a fault."""
        num_before = 0
        for source in self._sources:
            for block in source.blocks((self._key,), self._name_key):
                has_names = self._name_key is not None or block.kind == _NAMED
                name_key = (self._name_key or DEFAULT_NAME_KEY) if has_names else None
                encoding = Encoding((self._key,), self._tokenizer, unknown=b"", name_key=name_key,
                                    skip_bad_records=self._skips, remedy=self._remedy)
                (documents,) = encode_block(encoding, block)
                self._skipped.add_all(documents.tally.dropped, documents.reports)
                numbers = (num_before + 1 + np.flatnonzero(documents.is_kept)).tolist()
                names = [name.decode(errors="surrogateescape") for name in documents.names.splitlines()
                         ] if has_names else list(map(str, numbers))
                ends = np.cumsum(documents.lengths())[:-1]
                for number, name, residues in zip(
                        numbers, names, np.split(np.frombuffer(documents.ids, np.uint8), ends), strict=True):
                    yield number, block.source, Protein(name, residues)
                num_before += len(documents.is_kept)

    def _fault(self, number: int, protein: Protein, numbers_of: dict[bytes, int]) -> tuple[str, str]:
        """What is wrong with a protein, as a reason to count and as a sentence; both are empty if nothing is.

        `numbers_of`: the numbers of earlier proteins by the digests of their names; this one's is added.
        """
        if not len(protein):
            return "without residues", f"protein {number}, {protein.name}, has no residue"
        if not self._are_named_apart:
            return "", ""
        try:
            name = file_name(protein.name)
        except DataError as error:
            return "name not UTF-8", str(error)
        first = numbers_of.setdefault(hashlib.blake2b(name.encode(), digest_size=_DIGEST_BYTES).digest(), number)
        if first == number:
            return "", ""
        return "name of another", (f"proteins {first} and {number} both have the name {protein.name} (/ counts as _); "
                                   "each needs its own")

    def identity(self) -> list[Any]:
        """Facts that change if the input does: the keys, and each file's path, size and modification time."""
        skips = [FLAG] if self._skips else []
        return [self._key, self._name_key, *skips, *(facts for source in self._sources for facts in source.identity())]

    def have(self, path: Path) -> bool:
        """Whether `path` is one of the files."""
        return any(path.samefile(file) for source in self._sources for file, *_ in source.identity())


def file_name(name: str) -> str:
    """A protein's name in a form that files and HDF5 keys can have; raises DataError if it is not UTF-8 text."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(f"the name {name.encode(errors='surrogateescape')!r} is not UTF-8 text; rename that protein, "
                        "or write the file in UTF-8") from None
    return name.replace("/", "_")
