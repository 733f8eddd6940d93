"""Substitutions in ProteinGym's notation, `A1P:D2N`, each with the wild-type letter, the residue number and the new
letter, and in HGVS, `p.[Ala1Pro;Asp2Asn]`.
"""

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from megatron.data.corpus.vocab import AMINO_ACIDS, RESIDUE_LETTERS, THREE_LETTERS, Vocab
from megatron.errors import ResidueError

_FORM = re.compile(r"([A-Za-z])(-?[0-9]{1,9})([A-Za-z])")
_HGVS = re.compile(r"(?:\S+:)?p\.(.*)")  # with or without the name of a reference sequence
_HGVS_FORM = re.compile(r"\(?([A-Za-z]{3}|[A-Za-z])([0-9]{1,9})([A-Za-z]{3}|[A-Za-z]|=)\)?")
_NO_SUBSTITUTIONS = {  # of HGVS; the first that occurs in a mutant names it
    "fs": "a frameshift", "ext": "an extension", "delins": "a deletion with an insertion", "del": "a deletion",
    "ins": "an insertion", "dup": "a duplication", "Ter": "a stop", "*": "a stop"}


class Substitution(NamedTuple):
    """One residue replaced by another; `site` counts from 0."""

    site: int
    wild: str
    mutant: str


Mutant = tuple[Substitution, ...]
Variant = Mutant | str  # a str: the whole mutated protein, of which no substitutions are known


def letters_of(vocab: Vocab) -> frozenset[str]:
    """The residue letters of a vocabulary."""
    return frozenset(RESIDUE_LETTERS) & frozenset(vocab.tokens)


def parse_mutant(text: str, offset: int = 1) -> Mutant:
    """The substitutions of a mutant whose residue numbers start at `offset`, none for HGVS's wild type, `p.=`.

    Raises ResidueError for another notation. Use `check_mutant` to find out whether they fit a protein.
    """
    hgvs = _HGVS.fullmatch(text.strip())
    words = text.strip().split(":") if hgvs is None else hgvs[1].strip("[]()").split(";")
    if hgvs is not None and words == ["="]:
        return ()
    form, substitutions = _FORM if hgvs is None else _HGVS_FORM, list[Substitution]()
    for word in words:
        match = form.fullmatch(word.strip())
        wild = match and _letter(match[1])
        mutant = match and (wild if match[3] == "=" else _letter(match[3]))
        if not (match and wild and mutant):
            raise ResidueError(f"mutant {text!r} {_no_substitution(text, hgvs is not None)}")
        substitutions.append(Substitution(int(match[2]) - offset, wild, mutant))
    if len({one.site for one in substitutions}) < len(substitutions):
        raise ResidueError(f"mutant {text!r} substitutes one residue twice")
    return tuple(substitutions)


def check_mutant(mutant: Mutant, wild_type: str, letters: Collection[str], offset: int = 1) -> None:
    """Raises ResidueError for a residue number outside the protein, a wild-type letter that is not there, or a new
    letter that is not in `letters`.
    """
    for site, wild, other in mutant:
        name = f"{wild}{site + offset}{other}"
        if not 0 <= site < len(wild_type):
            raise ResidueError(f"{name}: the protein has the residues {offset} to {len(wild_type) + offset - 1}; "
                               "--offset tells the number of its first")
        if wild_type[site] != wild:
            raise ResidueError(f"{name}: residue {site + offset} of the protein is {wild_type[site]}; --offset tells "
                               "the number of its first")
        if other not in letters:
            raise ResidueError(f"{name}: {other} is not in the model's vocabulary")


def has_score(variant: Variant) -> bool:
    """Whether every substitution replaces one of the 20 standard amino acids by another of them, or, if the whole
    protein is given, it has one of them.

    Models hardly ever see the other letters (X, B, Z, U, O), so their probabilities say nothing about the protein.
    """
    if isinstance(variant, str):
        return bool(standard_sites(variant))
    return all(one.wild in AMINO_ACIDS and one.mutant in AMINO_ACIDS for one in variant)


def standard_sites(protein: str) -> list[int]:
    """The sites with one of the 20 standard amino acids, ascending, from 0."""
    return [site for site, letter in enumerate(protein) if letter in AMINO_ACIDS]


def check_protein(protein: str, letters: Collection[str]) -> None:
    """Raises ResidueError for a protein without residues, or with a letter that is not in `letters`."""
    if not protein:
        raise ResidueError("the protein has no residue")
    for number, letter in enumerate(protein, 1):
        if letter not in letters:
            raise ResidueError(f"column {number}: {letter!r} is not a residue of the model's vocabulary")


def mutated(wild_type: str, variant: Variant) -> str:
    """The protein with a variant's substitutions applied."""
    return variant if isinstance(variant, str) else _with_letters(wild_type, [(one.site, one.mutant)
                                                                              for one in variant])


def wild_type_of(mutated_sequence: str, mutant: Mutant, offset: int = 1) -> str:
    """The mutated sequence with a mutant's substitutions undone; raises ResidueError if it does not have them."""
    for site, wild, other in mutant:
        if not (0 <= site < len(mutated_sequence) and mutated_sequence[site] == other):
            found = mutated_sequence[site] if 0 <= site < len(mutated_sequence) else "not there"
            raise ResidueError(f"mutated_sequence is not what {wild}{site + offset}{other} says: residue "
                               f"{site + offset} is {found}; --offset tells the number of its first")
    return _with_letters(mutated_sequence, [(one.site, one.wild) for one in mutant])


def _letter(name: str) -> str | None:
    """The letter of a residue named by one letter or three; None for another name."""
    return name.upper() if len(name) == 1 else THREE_LETTERS.get(name.capitalize())


def _no_substitution(text: str, is_hgvs: bool) -> str:
    """What is wrong with a mutant that consists of no substitutions, as the end of a sentence."""
    kind = next((kind for sign, kind in _NO_SUBSTITUTIONS.items() if sign in text), None) if is_hgvs else None
    if kind is not None:
        return f"is {kind}, and only substitutions can be scored"
    return "is not of the form A1P, or A1P:D2N for several substitutions, or p.[Ala1Pro;Asp2Asn]"


def _with_letters(protein: str, letters: Sequence[tuple[int, str]]) -> str:
    residues = list(protein)
    for site, letter in letters:
        residues[site] = letter
    return "".join(residues)
