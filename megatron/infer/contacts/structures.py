"""Reads structures as `Chain`s, residues with the coordinates of an atom each: PDB, mmCIF (by gemmi) and JSON lines.

NAME.pdb .ent .cif .mmcif (.gz)  protein chains of the first model, named NAME_CHAIN: C-beta atoms, C-alpha of glycine
NAME.jsonl .json (.gz)           an object per line: id, seq, ca ([x, y, z] of C-alpha in angstrom, null if unresolved)
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from megatron.errors import ConfigError, DataError
from megatron.infer.contacts.chains import Chain

_COORDINATES, _LINES = (".pdb", ".ent", ".cif", ".mmcif"), (".jsonl", ".json")
_LETTERS = re.compile("[A-Z]+")


def read_chains(words: Sequence[str]) -> list[Chain]:
    """The chains of the files, and of all structure files in the folders, that the command-line arguments name.

    An argument is a path, or PATH:CHAIN,CHAIN for some chains only (for JSON lines: their ids). Files of a folder are
    read in the order of their names. Raises DataError for files or chains that are missing, unreadable or of equal
    names, and ConfigError if gemmi is needed but not installed.
    """
    found: list[Chain] = []
    for word in words:
        path, wanted = _parted(word)
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if _ending(file) in _COORDINATES + _LINES)
            if not files:
                raise DataError(f"{path}: holds no {', '.join(_COORDINATES + _LINES)}; give a folder of structures")
        for file in files:
            found += _chosen(file, wanted)
    names = [chain.name for chain in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{twice[0]} is the name of two chains among the structures; give each once")
    return found


def _parted(word: str) -> tuple[Path, list[str]]:
    """The path of an argument, and the chains named after its colon, if any."""
    path, colon, chains = word.rpartition(":")
    if colon and not Path(word).exists():
        return Path(path), chains.split(",")
    return Path(word), []


def _chosen(file: Path, wanted: Sequence[str]) -> list[Chain]:
    """The wanted chains of a file, in the order wanted; all if none is named."""
    try:
        labelled = list(_of_lines(file) if _ending(file) in _LINES else _of_coordinates(file))
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error}); name files of structures, or folders of "
                        "them") from None
    if not labelled:
        raise DataError(f"{file}: holds no protein chain; give a whole structure of a protein")
    by_label = dict(labelled)
    if missing := [label for label in wanted if label not in by_label]:
        there = sorted(by_label)
        raise DataError(f"{file}: has no protein chain {missing[0]}; it has {', '.join(there[:20])}"
                        f"{', …' * (len(there) > 20)}")
    return [by_label[label] for label in wanted] if wanted else [chain for _, chain in labelled]


def _of_coordinates(file: Path) -> Iterator[tuple[str, Chain]]:
    """The protein chains of the first model, each with its chain letter."""
    gemmi = _gemmi()
    if _ending(file) not in _COORDINATES:
        raise DataError(f"{file}: is no structure by its name; expected {', '.join(_COORDINATES + _LINES)}, plain or "
                        ".gz")
    if not file.stat().st_size:  # stat also raises the system's own error for a bad path, before gemmi
        return
    try:
        structure = gemmi.read_structure(str(file))
        structure.setup_entities()
        structure.assign_label_seq_id()
    except (OSError, RuntimeError, ValueError, IndexError) as error:
        raise DataError(f"{file}: cannot be read as a structure ({' '.join(str(error).split())[:200]}); copy it again"
                        ) from None
    peptides = (gemmi.PolymerType.PeptideL, gemmi.PolymerType.PeptideD)
    for chain in structure[0] if len(structure) else ():
        polymer = chain.get_polymer()
        if len(polymer) and polymer.check_polymer_type() in peptides:
            name = f"{file.name.removesuffix('.gz').rpartition('.')[0]}_{chain.name}"
            yield chain.name, _of_polymer(name, polymer, structure.get_entity_of(polymer))


def _of_polymer(name: str, polymer: Any, entity: Any) -> Chain:
    """The chain with all residues of its SEQRES record, resolved or not; without one, those with coordinates."""
    gemmi = _gemmi()
    residues = list(polymer.first_conformer())
    names = [gemmi.Entity.first_mon(names) for names in entity.full_sequence] if entity is not None else []
    places = [residue.label_seq - 1 if residue.label_seq is not None else None for residue in residues]
    if not names:
        names, places = [residue.name for residue in residues], list(range(len(residues)))
    letters = [gemmi.find_tabulated_residue(name).one_letter_code.upper() for name in names]
    atoms_r3 = torch.full((len(names), 3), torch.nan)
    for place, residue in zip(places, residues, strict=True):
        wanted = "CA" if residue.name == "GLY" else "CB"
        atoms = [atom for atom in residue if atom.name == wanted]
        if place is not None and atoms:
            atoms_r3[place] = torch.tensor(max(atoms, key=lambda atom: atom.occ).pos.tolist())  # the first of equals
    return Chain(name, "".join(letter if letter.isalpha() else "X" for letter in letters), atoms_r3)


def _of_lines(file: Path) -> Iterator[tuple[str, Chain]]:
    """The chain of each line's object, with its id, or with its line number if it has none."""
    opened = gzip.open if file.name.endswith(".gz") else open
    number = 0
    try:
        with opened(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    chain = _of_object(json.loads(line), number)
                    yield chain.name, chain
    except (EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{file}: line {max(number, 1)}: damaged, or of another form ({what[:200]}); expected an "
                        "object with seq and ca") from None


def _of_object(fields: dict[str, Any], number: int) -> Chain:
    sequence = str(fields["seq"])
    if not _LETTERS.fullmatch(sequence):
        raise ValueError(f"not residues: {sequence}")
    atoms_r3 = torch.tensor([[torch.nan] * 3 if atom is None else atom for atom in fields["ca"]], dtype=torch.float32)
    if atoms_r3.shape != (len(sequence), 3):
        raise ValueError(f"{len(sequence)} residues, and C-alpha atoms of {len(atoms_r3)}")
    return Chain(str(fields.get("id", number)), sequence, atoms_r3)


def _ending(file: Path) -> str:
    """The file's suffix in lower case, without .gz."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def _gemmi() -> ModuleType:
    try:
        import gemmi
    except ImportError:
        raise ConfigError("PDB and mmCIF files are read with gemmi, which is not there: pip install gemmi") from None
    return gemmi
