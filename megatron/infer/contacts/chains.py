"""Protein chains with known structures, and which pairs of their residues are in contact.

Two residues are in contact if their atoms are less than CUTOFF_ANGSTROM apart. Pairs count if they are at least
LEAST_SEPARATION apart in the sequence. Shapes: r residues of a protein, p pairs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.errors import DataError

CUTOFF_ANGSTROM = 8.0
LEAST_SEPARATION = 6  # in the sequence, of pairs that count


@dataclass(frozen=True)
class Chain:
    """A protein's name, its residues, and the coordinates of one atom per residue.

    `atoms_r3`: fp32 in angstrom, NaN for unresolved residues.
    """

    name: str
    sequence: str
    atoms_r3: Tensor

    def cropped(self, size: int | None) -> "Chain":
        """The chain's first `size` residues; None: all."""
        return Chain(self.name, self.sequence[:size], self.atoms_r3[:size])

    def pairs(self) -> "Pairs":
        """All pairs of resolved residues at least LEAST_SEPARATION apart in the sequence."""
        return pairs_of(self.atoms_r3)


@dataclass(frozen=True)
class Pairs:
    """Pairs of residues by their indices, counted from 0, and whether they are in contact."""

    first_p: Tensor
    second_p: Tensor
    touches_p: Tensor


def pairs_of(atoms_r3: Tensor) -> Pairs:
    """All pairs of resolved residues at least LEAST_SEPARATION apart in the sequence.

    `atoms_r3`: an atom per residue, in angstrom, NaN for unresolved residues.
    """
    first_p, second_p = torch.triu_indices(len(atoms_r3), len(atoms_r3), LEAST_SEPARATION).unbind()
    distance_p = (atoms_r3[first_p] - atoms_r3[second_p]).norm(dim=1)
    is_resolved_p = ~distance_p.isnan()
    return Pairs(first_p[is_resolved_p], second_p[is_resolved_p], distance_p[is_resolved_p] < CUTOFF_ANGSTROM)


def structures_of(proteins: Mapping[str, str], chains: Sequence[Chain]) -> dict[str, Chain]:
    """The structures of the proteins that have one, by protein name; `proteins` maps names to sequences.

    Chains and proteins are matched by name; a single chain and a single protein match whatever their names. Raises
    DataError if there are chains but none matches, and if a chain's sequence differs from its protein's.
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
