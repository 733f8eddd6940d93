"""What a model thinks of residues, the one in question masked or not: log-probabilities, in packed rows.

The copies of one protein, each with another residue masked, lie one behind the other in rows without padding, and the
head works on the residues in question alone. Probabilities are over the whole vocabulary, as in ESM's `predict.py`: the
softmax of all tokens, special ones included. Shapes: v tokens of the vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from megatron.errors import ConfigError
from megatron.infer.answers import all_logits
from megatron.infer.pretrained import Pretrained
from megatron.infer.rows import packed, token_budget
from megatron.parallel.collectives import everyones


class Copy(NamedTuple):
    """A protein or a window of it, its ids between its ends, and the places there of the tokens in question."""

    ids: np.ndarray
    places: Sequence[int]


@torch.no_grad()
def log_probabilities(pretrained: Pretrained, copies: Iterable[Copy], budget: int | None = None,
                      progress: Callable[[int], object] = lambda copies: None) -> Iterator[np.ndarray]:
    """For each copy, in their order, the log-probabilities at its places, fp32 [places, v].

    `copies` are made as they are needed. `budget`: the tokens of a row, by default as memory allows; `progress` hears
    of how many copies are done. Tensor ranks call this together and get the same.
    """
    model, mesh = pretrained.model, pretrained.mesh
    budget = budget or min(everyones(token_budget(model.config, 0, mesh.device), mesh.tensor))
    for row in _rows(copies, budget):
        sequence = packed([copy.ids for copy in row], mesh.device)
        starts = sequence.cu_seqlens.tolist()
        places = [start + place for start, copy in zip(starts, row, strict=False) for place in copy.places]
        hidden_th = model.hidden(sequence)[torch.tensor(places, device=mesh.device)]
        logits_tv = all_logits(model, hidden_th, mesh)[:, :pretrained.vocab.size]
        values_tv = logits_tv.float().log_softmax(-1).cpu().numpy()
        progress(len(row))
        yield from np.split(values_tv, np.cumsum([len(copy.places) for copy in row])[:-1])


def longest_window(pretrained: Pretrained, asked: int | None) -> int | None:
    """The residues of a window: what is asked for, else what the model's positions allow; None: any number.

    Raises ConfigError where the model has not got so many positions.
    """
    limit = pretrained.max_residues
    if asked is not None and (asked < 1 or (limit is not None and asked > limit)):
        raise ConfigError(f"--window is {asked}; it must be 1 or greater" +
                          ("" if limit is None else f", and at most {limit}, whose positions the model knows"))
    return limit if asked is None else asked


def window_around(site: int, num_residues: int, longest: int | None) -> range:
    """The residues that a model sees of a protein for one of them: ProteinGym's optimal window.

    The whole protein where it fits; else `longest` residues, the site in their middle, or as near to it as the
    protein's ends allow.
    """
    if longest is None or num_residues <= longest:
        return range(num_residues)
    start = min(max(site - longest // 2, 0), num_residues - longest)
    return range(start, start + longest)


def copy_of(pretrained: Pretrained, residues: np.ndarray, sites: Sequence[int], longest: int | None, is_masked: bool
            ) -> Copy:
    """A protein, given as its residues' ids, in the window around some sites, all of which have the same one."""
    window = window_around(sites[0], len(residues), longest)
    ids = pretrained.between_ends(residues[window.start:window.stop], "protein")
    places = [1 + site - window.start for site in sites]
    if is_masked:
        ids[places] = pretrained.vocab.mask_id
    return Copy(ids, places)


def _rows(copies: Iterable[Copy], budget: int) -> Iterator[list[Copy]]:
    """As many copies at a time, in their order, as have `budget` tokens, or one."""
    row, num_tokens = list[Copy](), 0
    for copy in copies:
        if row and num_tokens + len(copy.ids) > budget:
            yield row
            row, num_tokens = [], 0
        row.append(copy)
        num_tokens += len(copy.ids)
    if row:
        yield row
