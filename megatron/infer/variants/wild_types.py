"""The wild type of each assay: from the command line, a FASTA file or ProteinGym's reference file."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron.data.corpus.vocab import Vocab
from megatron.errors import ConfigError, DataError, ResidueError
from megatron.infer.proteins import ProteinFiles
from megatron.infer.variants.mutants import check_protein, letters_of
from megatron.infer.variants.tables import read_csv

ONE = "protein"  # the name of that of the command line


@dataclass(frozen=True)
class AssayReference:
    """What a reference file says about an assay: its wild type, and the UniProt entry and category for averages; empty
    if it does not say.
    """

    wild_type: str
    uniprot: str = ""
    category: str = ""


@dataclass(frozen=True)
class WildTypes:
    """Wild types by assay name. A single one in `proteins` is for all assays; entries of a reference are by DMS_id and
    by file name.
    """

    proteins: dict[str, str]
    entries: dict[str, AssayReference] | None = None
    reference: str = ""

    def of(self, path: Path, name: str) -> AssayReference | None:
        """What is known about the assay in a file; `name` is the file's name without its ending. None if nothing was
        given.

        Raises DataError if wild types were given, but none for this assay.
        """
        entry = None
        if self.entries is not None:
            entry = self.entries.get(name) or self.entries.get(path.name)
            if entry is None:
                raise DataError(f"{path}: {self.reference} has no line whose DMS_id is {name}; add it there")
        if not self.proteins:
            return entry
        protein = next(iter(self.proteins.values())) if len(self.proteins) == 1 else self.proteins.get(name)
        if protein is None:
            raise DataError(f"{path}: none of the {len(self.proteins)} proteins of --fasta is called {name}; call its "
                            "wild type so, or give a file of one protein")
        return replace(entry or AssayReference(""), wild_type=protein)


def read_wild_types(sequence: str | None, fasta: str | None, reference: Path | None, vocab: Vocab, key: str = "text"
                    ) -> WildTypes:
    """Wild types from the flags of these names; raises ConfigError, DataError or ResidueError. `key`: as in
    `read_proteins`.
    """
    if sequence is not None and fasta is not None:
        raise ConfigError("--sequence and --fasta both give the wild type; leave one of the two out")
    proteins = {} if fasta is None else read_proteins([fasta], vocab, key)
    if sequence is not None:
        proteins = {ONE: _checked(sequence, vocab, "--sequence")}
    if reference is None:
        return WildTypes(proteins)
    table, found = read_csv(reference), list[str]()
    for line, text in zip(table.lines, table.needed("target_seq"), strict=True):
        found.append(_checked(text, vocab, f"{reference}: line {line}: target_seq"))
    files, uniprots, categories = (table.column(name) or [""] * len(found)
                                   for name in ("DMS_filename", "UniProt_ID", "coarse_selection_type"))
    entries = [AssayReference(*each) for each in zip(found, uniprots, categories, strict=True)]
    return WildTypes(proteins, {name: entry for names in (files, table.needed("DMS_id"))
                                for name, entry in zip(names, entries, strict=True) if name}, str(reference))


def read_proteins(paths: Sequence[str], vocab: Vocab, key: str = "text") -> dict[str, str]:
    """The proteins of files as letters, by name; raises DataError.

    `key`: key or column of the sequence, for records that have several.
    """
    proteins: dict[str, str] = {}
    files = ProteinFiles(paths, key, None, vocab, are_named_apart=True)
    for name, residues in ((protein.name, protein.residues) for protein in files):
        if vocab.unk_id in residues:
            number = int(np.flatnonzero(residues == vocab.unk_id)[0]) + 1
            raise DataError(f"{', '.join(paths)}: {name}: residue {number} is not in the model's vocabulary")
        proteins[name] = vocab.letters(residues)
    return proteins


def _checked(text: str, vocab: Vocab, name: str) -> str:
    """A protein in upper case without white space and the final stop; raises ResidueError, which calls it `name`."""
    protein = "".join(text.split()).upper().removesuffix("*")
    try:
        check_protein(protein, letters_of(vocab))
    except ResidueError as error:
        raise ResidueError(f"{name}: {error}") from None
    return protein
