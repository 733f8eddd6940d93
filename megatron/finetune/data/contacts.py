"""Contacts of a protein as a table that can be cropped and batched like its residues.

A table is int32 [r, 1 + k]. Column 0 says whether a residue is resolved; the others hold, for each contact with a later
residue, the distance in the sequence, 0 if there are fewer than k. Pairs nearer than LEAST_SEPARATION are left out.
"""

from typing import Any

import numpy as np
import torch

from megatron.finetune.data.record import ProteinRecord, shown
from megatron.infer.contacts.chains import LEAST_SEPARATION, Pairs, pairs_of


def read_contacts(record: ProteinRecord, pairs_from: int | None) -> np.ndarray:
    """The table of a record, whose label has either a position for each residue or a list of pairs; raises DataError.

    `pairs_from`: the number of the first residue in lists of pairs, 0 or 1; None if unknown.
    """
    value = record.label if isinstance(record.label, np.ndarray) else record.present()
    if _are_pairs(value) and (len(value) or pairs_from is not None):
        return _of_pairs(record, value, pairs_from)
    return table_of_atoms(_places(record, value))


def table_of_atoms(atoms_r3: np.ndarray) -> np.ndarray:
    """The table for atoms at these coordinates in angstrom, NaN for unresolved residues."""
    pairs = pairs_of(torch.from_numpy(atoms_r3))
    touching_p2 = torch.stack([pairs.first_p, pairs.second_p], 1)[pairs.touches_p].numpy()
    return _table(touching_p2, ~np.isnan(atoms_r3).any(axis=1))


def pairs_in(table: np.ndarray) -> Pairs:
    """All pairs of resolved residues of a table, or of its first rows, that are far enough apart in the sequence."""
    length = len(table)
    touches_rr = np.zeros((length, length), dtype=bool)
    first_p, column_p = np.nonzero(table[:, 1:])
    second_p = first_p + table[first_p, column_p + 1]
    is_inside_p = second_p < length
    touches_rr[first_p[is_inside_p], second_p[is_inside_p]] = True
    first_p, second_p = np.triu_indices(length, LEAST_SEPARATION)
    is_resolved_p = (table[first_p, 0] > 0) & (table[second_p, 0] > 0)
    first_p, second_p = first_p[is_resolved_p], second_p[is_resolved_p]
    return Pairs(torch.from_numpy(first_p), torch.from_numpy(second_p), torch.from_numpy(touches_rr[first_p, second_p]))


def _table(touching_p2: np.ndarray, is_resolved_r: np.ndarray) -> np.ndarray:
    """The table for sorted pairs of residues in contact; each pair occurs once, the first residue before the second."""
    first_p, second_p = touching_p2[np.argsort(touching_p2[:, 0], kind="stable")].T
    counts_r = np.bincount(first_p, minlength=len(is_resolved_r))
    table = np.zeros((len(is_resolved_r), 1 + counts_r.max(initial=0)), dtype=np.int32)
    table[:, 0] = is_resolved_r
    places_p = np.arange(len(first_p)) - np.repeat(np.cumsum(counts_r) - counts_r, counts_r)
    table[first_p, 1 + places_p] = second_p - first_p
    return table


def _are_pairs(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 2 and value.shape[1] == 2
    return isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)


def _of_pairs(record: ProteinRecord, value: Any, pairs_from: int | None) -> np.ndarray:
    if pairs_from is None:
        raise record.wrong(f"the label {shown(value)} lists pairs, in which the first residue is 0 or 1; --pairs-from "
                           "says which")
    size, pairs = len(record.ids), set[tuple[int, int]]()
    for pair in value.tolist() if isinstance(value, np.ndarray) else value:
        if not all(type(place) is int and pairs_from <= place < pairs_from + size for place in pair):
            raise record.wrong(f"the label has the pair {shown(pair)}; expected two of the residues {pairs_from} to "
                               f"{pairs_from + size - 1}, which with --pairs-from {pairs_from} there are")
        first, second = sorted(pair)
        if second - first >= LEAST_SEPARATION:
            pairs.add((first - pairs_from, second - pairs_from))
    return _table(np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2), record.counts())


def _places(record: ProteinRecord, value: Any) -> np.ndarray:
    """The coordinates of each residue's atom, float32 [r, 3] in angstrom, NaN for residues that are unresolved or
    masked.
    """
    try:
        if not isinstance(value, np.ndarray):
            value = [[np.nan] * 3 if atom is None else atom for atom in value]
        atoms_r3 = np.array(value, dtype=np.float32)
    except (TypeError, ValueError):
        atoms_r3 = np.empty(0, dtype=np.float32)
    if atoms_r3.ndim != 2 or atoms_r3.shape[1] != 3:
        raise record.wrong(f"the label {shown(value)} is neither a place [x, y, z], or null, for each residue, nor a "
                           "list of pairs of residues")
    record.check_length("places", len(atoms_r3))
    if np.isinf(atoms_r3).any():
        raise record.wrong("a place of the label is infinite; null stands for an unresolved residue")
    atoms_r3[np.isnan(atoms_r3).any(axis=1) | ~record.counts()] = np.nan
    return atoms_r3
