"""Files of variants: tables as ProteinGym's, with or without what was measured, and lists of mutants, one a line."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.errors import DataError, ResidueError
from megatron.infer.skipped import REMEDY, Skipped
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
TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")  # what files of columns end in
_DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Assay:
    """The variants of one protein, in the order of their file; `measured` [variants] has nan where nothing was.

    `places`: the rows of the table that they stand in, from 0, which are not all where some were left out. `entry`:
    what is known of it besides its file.
    """

    name: str
    table: TextTable
    wild_type: str
    places: list[int]
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
    """The file of each assay by its name; of a folder the CSVs and TSVs, sorted. Raises DataError."""
    files: dict[str, Path] = {}
    for path in inputs:
        found = [path]
        if path.is_dir():
            found = sorted(each for each in path.iterdir() if each.name.endswith(TABLES) and each != reference)
        if not found:
            raise DataError(f"{path}: has no .csv or .tsv; give files of variants, or a folder of them")
        for file in found:
            name = file.name.removesuffix(".gz").rsplit(".", 1)[0]
            if name in files:
                raise DataError(f"{file}: {files[name]} is called {name}, too; give one of them another name")
            files[name] = file
    return files


def read_assay(name: str, path: Path, wild_types: WildTypes, letters: Collection[str], offset: int = 1,
               skipped: Skipped | None = None) -> Assay:
    """The variants in a file that fit their wild type; `letters`: the vocabulary's.

    `skipped` is told of those that do not, which are left out; without it the first of them raises DataError, as
    whatever concerns all of them does.
    """
    entry = wild_types.of(path, name)
    is_table = path.name.endswith(TABLES)
    table = read_csv(path, takes_uneven=True) if is_table else read_list(path, MUTANT)
    texts, sequences, measurements = table.needed(MUTANT), table.column(MUTATED), table.column(MEASURED)
    if not texts:
        raise DataError(f"{path}: holds no variant")
    if entry is None and sequences is None:
        raise DataError(f"{path}: says nothing of the wild type; give --sequence, --fasta or --reference, or a column "
                        f"{MUTATED}")
    if sequences is not None:
        sequences = ["".join(sequence.split()).upper() for sequence in sequences]
    wild_type = entry.wild_type if entry is not None else _worked_out(texts, sequences or (), letters, offset)
    places, mutants, measured = list[int](), list[Mutant](), list[float]()
    for at, text in enumerate(texts):
        try:
            if at in table.uneven:
                raise ResidueError(table.uneven[at])
            mutant = _fitting(text, None if sequences is None else sequences[at], wild_type, letters, offset)
            value = math.nan if measurements is None else _measured(measurements[at])
        except ResidueError as error:
            finding = f"{path}: line {table.lines[at]}: {error}"
            if skipped is None:
                raise DataError(f"{finding}; {REMEDY}") from None
            skipped.add("cannot be scored", finding)
            continue
        places.append(at)
        mutants.append(mutant)
        measured.append(value)
    return Assay(name, table, wild_type, places, mutants, None if measurements is None else np.array(measured),
                 entry or AssayReference(wild_type))


def _worked_out(texts: Sequence[str], sequences: Sequence[str], letters: Collection[str], offset: int) -> str:
    """The wild type that most mutants have with their mutated sequences; empty where none has one."""
    found = Counter[str]()
    for text, sequence in zip(texts, sequences, strict=True):
        with suppress(ResidueError):
            found[wild_type_of(sequence, parse_mutant(text, offset), offset)] += 1
    return next((protein for protein, _ in found.most_common() if set(protein) <= set(letters)), "")


def _fitting(text: str, sequence: str | None, wild_type: str, letters: Collection[str], offset: int) -> Mutant:
    """The mutant of that text; raises ResidueError where it does not fit its wild type, or its mutated sequence.

    An empty `wild_type` is one that no mutated sequence has.
    """
    mutant = parse_mutant(text, offset)
    if not wild_type:
        check_protein(wild_type_of(sequence or "", mutant, offset), letters)
    check_mutant(mutant, wild_type, letters, offset)
    if sequence is not None:
        _check_sequence(sequence, mutated(wild_type, mutant), text, offset)
    return mutant


def _check_sequence(found: str, expected: str, text: str, offset: int) -> None:
    """Raises ResidueError where a file's mutated sequence is another than its mutant makes of the wild type."""
    if found == expected:
        return
    if len(found) != len(expected):
        raise ResidueError(f"{MUTATED} has {len(found)} residues, and the protein {len(expected)}")
    site = next(site for site, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
    raise ResidueError(f"{MUTATED} is not what mutant {text} makes of the wild type: residue {site + offset} is "
                       f"{found[site]}, and should be {expected[site]}")


def _measured(text: str) -> float:
    """What was measured of a variant, nan where nothing was; raises ResidueError for what is no number."""
    if not text.strip() or text.strip().lower() == "na":
        return math.nan
    try:
        value = float(text)
    except ValueError:
        remedy = "write a decimal point" if _DECIMAL_COMMA.fullmatch(text.strip()) else (
            "leave it empty where nothing was measured")
        raise ResidueError(f"{MEASURED} is {text!r}, which is no number; {remedy}") from None
    return value if math.isfinite(value) else math.nan
