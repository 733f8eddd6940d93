"""Log-probabilities of residues under a model, masked or not.

Copies of a protein, each with a different residue masked, are packed into rows without padding. The head is computed
only for the residues in question. Shapes: v tokens of the vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from megatron.infer.answers import all_logits
from megatron.infer.pretrained import Pretrained
from megatron.infer.rows import grouped, packed, token_budget
from megatron.infer.windows import window_around
from megatron.parallel.waits import read


class Copy(NamedTuple):
    """A protein or a window of it, as ids with the tokens at its ends, and the positions in it to predict."""

    ids: np.ndarray
    places: Sequence[int]


def copy_of(pretrained: Pretrained, residues: np.ndarray, sites: Sequence[int], longest: int | None, is_masked: bool
            ) -> Copy:
    """The window of a protein around some sites, which must all have the same window; `residues` are the protein's ids.
    """
    window = window_around(sites[0], len(residues), longest)
    ids = pretrained.between_ends(residues[window.start:window.stop], "protein")
    places = [1 + site - window.start for site in sites]
    if is_masked:
        ids[places] = pretrained.vocab.mask_id
    return Copy(ids, places)


@torch.no_grad()
def log_probabilities(pretrained: Pretrained, copies: Iterable[Copy], budget: int | None = None,
                      progress: Callable[[int], object] = lambda copies: None) -> Iterator[np.ndarray]:
    """For each copy, in order, the log-probabilities in nats at its positions, fp32 [positions, v].

    `copies` can be a generator and is consumed as needed. `budget`: tokens in a row; None for as many as memory allows.
    `progress` is called with the number of copies that are done. v includes special tokens, as in ESM's `predict.py`.
    All tensor ranks must call this together; each gets the same result.
    """
    model, mesh = pretrained.model, pretrained.mesh
    for row in grouped(copies, lambda copy: len(copy.ids), token_budget(budget, model.config, 0, mesh)):
        sequence = packed([copy.ids for copy in row], mesh.device)
        starts = sequence.cu_seqlens.tolist()
        places = [start + place for start, copy in zip(starts, row, strict=False) for place in copy.places]
        hidden_th = model.hidden(sequence)[torch.tensor(places, dtype=torch.int64, device=mesh.device)]
        logits_tv = all_logits(model, hidden_th, mesh, pretrained.vocab.size)
        values_tv = read(logits_tv.float().log_softmax(-1)).numpy()
        progress(len(row))
        yield from np.split(values_tv, np.cumsum([len(copy.places) for copy in row])[:-1])
