"""Proteins whose structure is known: which pairs of residues touch. Shapes: r residues of a protein, p pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.errors import DataError

CUTOFF_ANGSTROM = 8.0
LEAST_SEPARATION = 6  # along the sequence, of pairs that count


@dataclass(frozen=True)
class Chain:
    """A protein's residues, and where an atom of each is, fp32 [r, 3] in angstrom, NaN where unresolved."""

    name: str
    sequence: str
    atoms_r3: Tensor

    def cropped(self, size: int | None) -> "Chain":
        """Its first residues; None: all."""
        return Chain(self.name, self.sequence[:size], self.atoms_r3[:size])

    def pairs(self) -> "Pairs":
        """All pairs of resolved residues that are far enough apart in the sequence."""
        return pairs_of(self.atoms_r3)


@dataclass(frozen=True)
class Pairs:
    """Pairs of residues by their places, and whether they touch."""

    first_p: Tensor
    second_p: Tensor
    touches_p: Tensor


def pairs_of(atoms_r3: Tensor) -> Pairs:
    """All pairs of residues whose atoms are there, NaN where they are not, that are far enough apart in the sequence.
    """
    first_p, second_p = torch.triu_indices(len(atoms_r3), len(atoms_r3), LEAST_SEPARATION).unbind()
    distance_p = (atoms_r3[first_p] - atoms_r3[second_p]).norm(dim=1)
    is_resolved_p = ~distance_p.isnan()
    return Pairs(first_p[is_resolved_p], second_p[is_resolved_p], distance_p[is_resolved_p] < CUTOFF_ANGSTROM)


def structures_of(proteins: Mapping[str, str], chains: Sequence[Chain]) -> dict[str, Chain]:
    """The structure of each protein that has one, by the protein's name; `proteins` has the residues of each name.

    A chain is that of the protein of its name; one chain is that of one protein, whatever they are called. Raises
    DataError where no name is the same, and where a chain has other residues than its protein.
    """
    by_name = {chain.name: chain for chain in chains}
    found = {name: by_name[name] for name in proteins if name in by_name}
    if len(chains) == len(proteins) == 1:
        found = dict(zip(proteins, chains, strict=True))
    if chains and not found:
        raise DataError(f"no structure has the name of a protein: the first are {chains[0].name} and "
                        f"{next(iter(proteins))}; call proteins as structures, FILE_CHAIN, or leave --input out")
    for name, chain in found.items():
        _check_same(name, proteins[name], chain)
    return found


def _check_same(name: str, here: str, chain: Chain) -> None:
    there = chain.sequence
    if there == here:
        return
    place = next((place for place, (one, other) in enumerate(zip(there, here, strict=False)) if one != other), None)
    where = (f"residue {place + 1} is {there[place]} there and {here[place]} here" if place is not None else
             f"it has {len(there)} residues there and {len(here)} here")
    raise DataError(f"the structure {chain.name} is not of {name}: {where}; give the structure's own sequence, or "
                    "leave --input out")
