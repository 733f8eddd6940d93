"""Reads files of variants: tables like ProteinGym's, with or without measurements, and lists with one mutant per line.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.data.corpus.tokenizer import MISSING_VALUES
from megatron.errors import DataError, ResidueError
from megatron.infer.skipped import REMEDY, Skipped
from megatron.infer.variants.mutants import (
    Mutant,
    Variant,
    check_mutant,
    check_protein,
    mutated,
    parse_mutant,
    wild_type_of,
)
from megatron.infer.variants.scores import MASKED, PSEUDO
from megatron.infer.variants.tables import TextTable, read_csv, read_list
from megatron.infer.variants.wild_types import AssayReference, WildTypes

MUTANT, HGVS, MUTATED, MEASURED = "mutant", "hgvs_pro", "mutated_sequence", "DMS_score"
TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")  # what files of columns end in
_NEEDS_PSEUDO = (f"a {MUTATED} alone, as of insertions and deletions, can be scored by --scoring {PSEUDO}: the others "
                 "score substitutions")
_DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+([eE][+-]?\d+)?")


@dataclass(frozen=True)
class AssayKeys:
    """The columns of the mutants and of what was measured that the user names; None for the usual ones."""

    mutant: str | None = None
    measured: str | None = None

    def mutants(self, table: TextTable, scoring: str) -> list[str]:
        """The column of mutants, usually `mutant` or, as in MaveDB, `hgvs_pro`.

        If there is none, all are empty where `mutated_sequence` is enough for the scoring; else raises DataError.
        """
        usual = HGVS if MUTANT not in table.names and table.names.count(HGVS) == 1 else MUTANT
        remedy = "--mutant-key names it"
        if self.mutant is None and usual not in table.names and MUTATED in table.names:
            if scoring == PSEUDO:
                return [""] * len(table.rows)
            remedy += f"; {_NEEDS_PSEUDO}"
        return table.needed(self.mutant or usual, remedy)

    def measurements(self, table: TextTable) -> list[str] | None:
        """The column of what was measured, usually `DMS_score`, and None if that is missing; raises DataError if one
        that the user names is.
        """
        return table.column(MEASURED) if self.measured is None else table.needed(
            self.measured, "--measured-key names what was measured")


@dataclass(frozen=True)
class Assay:
    """The variants of one protein, in the order of their file. `measured` [variants] is nan where nothing was measured.

    `places`: the table row of each variant, from 0; rows that were left out are missing. `entry`: what the reference
    file says of the assay.
    """

    name: str
    table: TextTable
    keys: AssayKeys
    wild_type: str
    places: list[int]
    variants: list[Variant]
    measured: np.ndarray | None
    entry: AssayReference

    @property
    def said(self) -> dict[str, str]:
        """The protein and category by which correlations are averaged, as the summary stores them."""
        return {"uniprot": self.entry.uniprot, "category": self.entry.category}

    @property
    def identity(self) -> str:
        """A digest of everything that the scores and their correlation depend on."""
        named = "" if self.keys == AssayKeys() else f" {self.keys}"
        return hashlib.sha256(f"{self.table.digest} {self.wild_type}{named}".encode()).hexdigest()


def files_of(inputs: Sequence[Path], reference: Path | None) -> dict[str, Path]:
    """The file of each assay, by name; a folder stands for its CSVs and TSVs, sorted. Raises DataError."""
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
               skipped: Skipped | None = None, keys: AssayKeys = AssayKeys(), scoring: str = MASKED) -> Assay:
    """The variants of a file that fit their wild type; `letters`: the residues of the vocabulary.

    `scoring`: by pseudo-ppl also those that have only a mutated sequence, for which no wild type is needed.
    Variants that do not fit are counted in `skipped` and left out; if that is None, the first of them raises DataError.
    Faults of the whole file always raise DataError.
    """
    entry = wild_types.of(path, name)
    table = (read_csv(path, takes_uneven=True) if path.name.endswith(TABLES) else
             read_list(path, [keys.mutant or MUTANT, MUTANT, HGVS]))
    texts, sequences, measurements = keys.mutants(table, scoring), _sequences(table), keys.measurements(table)
    if not texts:
        raise DataError(f"{path}: holds no variant")
    if entry is None and sequences is None:
        raise DataError(f"{path}: says nothing of the wild type; give --sequence, --fasta or --reference, or a column "
                        f"{MUTATED}")
    wild_type = entry.wild_type if entry is not None else _worked_out(texts, sequences or (), letters, offset)
    places, variants, measured = list[int](), list[Variant](), list[float]()
    for at, text in enumerate(texts):
        try:
            if at in table.uneven:
                raise ResidueError(table.uneven[at])
            sequence = None if sequences is None else sequences[at]
            variant = (_by_sequence(sequence, letters, scoring) if sequence is not None and not text.strip() else
                       _fitting(text, sequence, wild_type, letters, offset))
            value = math.nan if measurements is None else _measured(measurements[at], keys.measured or MEASURED)
        except ResidueError as error:
            finding = f"{path}: line {table.lines[at]}: {error}"
            if skipped is None:
                raise DataError(f"{finding}; {REMEDY}") from None
            skipped.add("cannot be scored", finding)
            continue
        places.append(at)
        variants.append(variant)
        measured.append(value)
    return Assay(name, table, keys, wild_type, places, variants, None if measurements is None else np.array(measured),
                 entry or AssayReference(wild_type))


def _sequences(table: TextTable) -> list[str] | None:
    """The mutated sequences in upper case, without white space, empty where they are missing; None without a column."""
    found = table.column(MUTATED)
    return found and ["" if text.strip().encode() in MISSING_VALUES else "".join(text.split()).upper()
                      for text in found]


def _worked_out(texts: Sequence[str], sequences: Sequence[str], letters: Collection[str], offset: int) -> str:
    """The wild type that most mutants imply together with their mutated sequences; empty if there is none."""
    found = Counter[str]()
    for text, sequence in zip(texts, sequences, strict=True):
        with suppress(ResidueError):
            found[wild_type_of(sequence, parse_mutant(text, offset), offset)] += 1
    return next((protein for protein, _ in found.most_common() if set(protein) <= set(letters)), "")


def _by_sequence(sequence: str, letters: Collection[str], scoring: str) -> str:
    """A mutated sequence that no mutant describes; raises ResidueError if it, or the scoring, is not fit for that."""
    if scoring != PSEUDO:
        raise ResidueError(f"has no mutant; {_NEEDS_PSEUDO}")
    check_protein(sequence, letters)
    return sequence


def _fitting(text: str, sequence: str | None, wild_type: str, letters: Collection[str], offset: int) -> Mutant:
    """Parse a mutant; raises ResidueError if it does not fit the wild type or its own mutated sequence.

    `wild_type` is empty if no mutated sequence implies one.
    """
    mutant = parse_mutant(text, offset)
    if not wild_type:
        check_protein(wild_type_of(sequence or "", mutant, offset), letters)
    check_mutant(mutant, wild_type, letters, offset)
    if sequence is not None:
        _check_sequence(sequence, mutated(wild_type, mutant), text, offset)
    return mutant


def _check_sequence(found: str, expected: str, text: str, offset: int) -> None:
    """Raises ResidueError if a mutated sequence in the file differs from what its mutant makes of the wild type."""
    if found == expected:
        return
    if len(found) != len(expected):
        raise ResidueError(f"{MUTATED} has {len(found)} residues, and the protein {len(expected)}")
    site = next(site for site, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
    raise ResidueError(f"{MUTATED} is not what mutant {text} makes of the wild type: residue {site + offset} is "
                       f"{found[site]}, and should be {expected[site]}")


def _measured(text: str, column: str) -> float:
    """The measured value of a variant, nan if there is none; raises ResidueError for text that is not a number."""
    if not text.strip() or text.strip().lower() == "na":
        return math.nan
    try:
        value = float(text)
    except ValueError:
        remedy = "write a decimal point" if _DECIMAL_COMMA.fullmatch(text.strip()) else (
            "leave it empty where nothing was measured")
        raise ResidueError(f"{column} is {text!r}, which is no number; {remedy}") from None
    return value if math.isfinite(value) else math.nan
