"""A first pass over the proteins: their lengths, and which of them are equal."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from megatron.errors import ConfigError
from megatron.infer.proteins import Protein
from megatron.infer.rows import grouped

DIGEST_BYTES = 16


@dataclass(frozen=True)
class Survey:
    """p proteins, of which u are distinct. Only the distinct ones are computed, in the order in which they first
    appear.
    """

    lengths_u: np.ndarray  # residues, int32
    distinct_p: np.ndarray  # which of the distinct ones each protein is, int64

    def parts(self, bytes_a_residue: int, most_residues: int, most_bytes: int) -> list[range]:
        """Ranges of distinct proteins within these limits, at least one protein each."""
        limit = max(1, min(most_residues, most_bytes // bytes_a_residue))
        groups = grouped(range(len(self.lengths_u)), self.lengths_u.tolist().__getitem__, limit)
        return [range(group[0], group[-1] + 1) for group in groups] or [range(0)]


def survey(proteins: Iterable[Protein], max_residues: int | None, window: int | None = None) -> Survey:
    """Read all proteins once.

    Raises ConfigError for a protein with more than `max_residues` if `window` is None, and for a window larger than
    that. Takes a few hundred bytes of memory per distinct protein.
    """
    if window is not None and max_residues is not None and window > max_residues:
        raise ConfigError(f"--window is {window}, and the model knows the positions of {max_residues}; give no more")
    lengths, distinct = array("i"), array("q")
    known: dict[bytes, int] = {}
    for number, protein in enumerate(proteins, 1):
        if window is None and max_residues is not None and len(protein) > max_residues:
            raise ConfigError(f"protein {number}, {protein.name}, has {len(protein)} residues, and the model knows the "
                              f"positions of {max_residues}; give --window {max_residues}")
        digest = hashlib.blake2b(protein.residues.tobytes(), digest_size=DIGEST_BYTES).digest()
        place = known.setdefault(digest, len(known))
        if place == len(lengths):
            lengths.append(len(protein))
        distinct.append(place)
    return Survey(np.array(lengths, dtype=np.int32), np.array(distinct, dtype=np.int64))


def first_ones(proteins: Iterable[Protein], surveyed: Survey) -> Iterator[Protein]:
    """The first of each set of equal proteins, in order: the distinct ones, which are computed."""
    num_before = 0
    for protein, place in zip(proteins, surveyed.distinct_p.tolist(), strict=True):
        if place == num_before:
            num_before += 1
            yield protein
