"""Files of variants: ProteinGym's CSVs, with or without what was measured, and lists of mutants, one a line."""

import hashlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.errors import DataError, ResidueError
from megatron.infer.variants.mutants import (
    Mutant,
    check_mutant,
    check_protein,
    mutated,
    parse_mutant,
    wild_type_of,
)
from megatron.infer.variants.tables import TextTable, read_csv, read_list
from megatron.infer.variants.wild_types import AssayReference, WildTypes

MUTANT, MUTATED, MEASURED = "mutant", "mutated_sequence", "DMS_score"


@dataclass(frozen=True)
class Assay:
    """The variants of one protein, in the order of their file; `measured` [variants] has nan where nothing was.

    `entry`: what is known of it besides its file.
    """

    name: str
    table: TextTable
    wild_type: str
    mutants: list[Mutant]
    measured: np.ndarray | None
    entry: AssayReference

    @property
    def said(self) -> dict[str, str]:
        """By what averages are taken, as the summary has it."""
        return {"uniprot": self.entry.uniprot, "category": self.entry.category}

    @property
    def identity(self) -> str:
        """A digest of what the scores depend on."""
        return hashlib.sha256(f"{self.table.digest} {self.wild_type}".encode()).hexdigest()


def files_of(inputs: Sequence[Path], reference: Path | None) -> dict[str, Path]:
    """The file of each assay by its name; of a folder the CSVs, sorted. Raises DataError."""
    files: dict[str, Path] = {}
    for path in inputs:
        found = sorted(each for each in path.iterdir() if each.name.endswith((".csv", ".csv.gz"))
                       and each != reference) if path.is_dir() else [path]
        if not found:
            raise DataError(f"{path}: has no .csv; give files of variants, or a folder of them")
        for file in found:
            name = file.name.removesuffix(".gz").rsplit(".", 1)[0]
            if name in files:
                raise DataError(f"{file}: {files[name]} is called {name}, too; give one of them another name")
            files[name] = file
    return files


def read_assay(name: str, path: Path, wild_types: WildTypes, letters: Collection[str], offset: int = 1) -> Assay:
    """The variants in a file, all of which fit their wild type; `letters`: the vocabulary's. Raises DataError."""
    entry = wild_types.of(path, name)
    is_csv = path.name.removesuffix(".gz").endswith(".csv")
    table = read_csv(path) if is_csv else read_list(path, MUTANT)
    texts, sequences = table.needed(MUTANT), table.column(MUTATED)
    if not texts:
        raise DataError(f"{path}: holds no variant")
    if entry is None and sequences is None:
        raise DataError(f"{path}: says nothing of the wild type; give --sequence, --fasta or --reference, or a column "
                        f"{MUTATED}")
    wild_type = entry.wild_type if entry is not None else ""
    mutants = []
    for at, text in enumerate(texts):
        try:
            mutant = parse_mutant(text, offset)
            sequence = None if sequences is None else "".join(sequences[at].split()).upper()
            if not wild_type and sequence is not None:
                wild_type = wild_type_of(sequence, mutant, offset)
                check_protein(wild_type, letters)
            check_mutant(mutant, wild_type, letters, offset)
            if sequence is not None:
                _check_sequence(sequence, mutated(wild_type, mutant), text, offset)
        except ResidueError as error:
            raise DataError(f"{path}: line {table.lines[at]}: {error}") from None
        mutants.append(mutant)
    return Assay(name, table, wild_type, mutants, _measured(table), entry or AssayReference(wild_type))


def _check_sequence(found: str, expected: str, text: str, offset: int) -> None:
    """Raises ResidueError where a file's mutated sequence is another than its mutant makes of the wild type."""
    if found == expected:
        return
    if len(found) != len(expected):
        raise ResidueError(f"{MUTATED} has {len(found)} residues, and the protein {len(expected)}")
    site = next(site for site, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
    raise ResidueError(f"{MUTATED} is not what mutant {text} makes of the wild type: residue {site + offset} is "
                       f"{found[site]}, and should be {expected[site]}")


def _measured(table: TextTable) -> np.ndarray | None:
    """What was measured of each variant; None where the file has no such column. Raises DataError."""
    texts = table.column(MEASURED)
    if texts is None:
        return None
    values = np.full(len(texts), math.nan)
    for at, text in enumerate(texts):
        if not text.strip() or text.strip().lower() == "na":
            continue
        try:
            values[at] = float(text)
        except ValueError:
            raise DataError(f"{table.path}: line {table.lines[at]}: {MEASURED} is {text!r}, which is no number; leave "
                            "it empty where nothing was measured") from None
    values[~np.isfinite(values)] = math.nan
    return values
