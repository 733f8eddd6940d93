"""The protein that variants were made of: from the command line, a FASTA or ProteinGym's reference file."""

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
    """What a reference says of an assay: its protein, and by what averages are taken, empty where it does not say."""

    wild_type: str
    uniprot: str = ""
    category: str = ""


@dataclass(frozen=True)
class WildTypes:
    """Wild types by the names of assays: `proteins` may have one for all; a reference's are by DMS_id and file, too."""

    proteins: dict[str, str]
    entries: dict[str, AssayReference] | None = None
    reference: str = ""

    def of(self, path: Path, name: str) -> AssayReference | None:
        """What is known of an assay in a file, whose name without its ending is `name`; None: nothing was given.

        Raises DataError where something was given for others alone.
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
    """What the flags of these names give; raises ConfigError, DataError, ResidueError. `key`: as in `read_proteins`."""
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
    """The proteins of files, as letters, by their names; raises DataError.

    `key`: of the sequence where records have several.
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
    """A protein without white space and the stop behind it, in capitals."""
    protein = "".join(text.split()).upper().removesuffix("*")
    try:
        check_protein(protein, letters_of(vocab))
    except ResidueError as error:
        raise ResidueError(f"{name}: {error}") from None
    return protein
