"""What a model thinks of residues, the one in question masked or not: log-probabilities, in packed rows.

Copies of a protein, each with another residue masked, lie one behind the other in rows without padding, and the head
works on the residues in question alone. Shapes: v ids.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from megatron.infer.answers import all_logits
from megatron.infer.pretrained import Pretrained
from megatron.infer.rows import grouped, packed, token_budget
from megatron.infer.windows import window_around


class Copy(NamedTuple):
    """A protein or a window of it, its ids between its ends, and the places there of the tokens in question."""

    ids: np.ndarray
    places: Sequence[int]


def copy_of(pretrained: Pretrained, residues: np.ndarray, sites: Sequence[int], longest: int | None, is_masked: bool
            ) -> Copy:
    """A protein, given as its residues' ids, in the window around some sites, all of which have the same one."""
    window = window_around(sites[0], len(residues), longest)
    ids = pretrained.between_ends(residues[window.start:window.stop], "protein")
    places = [1 + site - window.start for site in sites]
    if is_masked:
        ids[places] = pretrained.vocab.mask_id
    return Copy(ids, places)


@torch.no_grad()
def log_probabilities(pretrained: Pretrained, copies: Iterable[Copy], budget: int | None = None,
                      progress: Callable[[int], object] = lambda copies: None) -> Iterator[np.ndarray]:
    """For each copy, in their order, the log-probabilities in nats at its places, fp32 [places, v].

    `copies` are made as they are needed. `budget`: the tokens of a row, by default as memory allows; `progress` hears
    of how many copies are done. v: the vocabulary's tokens, special ones included, as in ESM's `predict.py`. Tensor
    ranks call this together and get the same.
    """
    model, mesh = pretrained.model, pretrained.mesh
    for row in grouped(copies, lambda copy: len(copy.ids), token_budget(budget, model.config, 0, mesh)):
        sequence = packed([copy.ids for copy in row], mesh.device)
        starts = sequence.cu_seqlens.tolist()
        places = [start + place for start, copy in zip(starts, row, strict=False) for place in copy.places]
        hidden_th = model.hidden(sequence)[torch.tensor(places, dtype=torch.int64, device=mesh.device)]
        logits_tv = all_logits(model, hidden_th, mesh, pretrained.vocab.size)
        values_tv = logits_tv.float().log_softmax(-1).cpu().numpy()
        progress(len(row))
        yield from np.split(values_tv, np.cumsum([len(copy.places) for copy in row])[:-1])
