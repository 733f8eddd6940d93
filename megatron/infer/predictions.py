"""What a model predicts at chosen tokens: the head is asked there alone. Shapes: c chosen tokens of a protein, v ids.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from megatron.infer.answers import all_logits
from megatron.infer.pretrained import Pretrained
from megatron.infer.rows import packed, shared_out, token_budget
from megatron.parallel.collectives import everyones


@torch.no_grad()
def log_probabilities(pretrained: Pretrained, proteins: Sequence[np.ndarray], chosen: Sequence[np.ndarray],
                      budget: int | None = None) -> list[np.ndarray]:
    """The logarithms of the probabilities, in nats, of every id at the chosen tokens of each protein, fp32 [c, v].

    A protein is its ids between its ends, some of them masked; v are all ids that the head knows, as in training, those
    that fill the vocabulary up among them. Tensor ranks call this together and get the same.
    """
    model, mesh = pretrained.model, pretrained.mesh
    budget = budget or min(everyones(token_budget(model.config, 1, mesh.device), mesh.tensor))
    found = list[np.ndarray]([np.empty(0)] * len(proteins))
    for places in shared_out([len(ids) for ids in proteins], budget):
        row = packed([proteins[place] for place in places], mesh.device)
        starts = np.cumsum([0, *(len(proteins[place]) for place in places)])
        flat_m = np.concatenate([chosen[place] + start for place, start in zip(places, starts[:-1], strict=True)])
        hidden_mh = model.hidden(row)[torch.from_numpy(flat_m).to(mesh.device)]
        logits_mv = all_logits(model, hidden_mh, mesh).float().log_softmax(-1).cpu().numpy()
        parts = np.split(logits_mv, np.cumsum([len(chosen[place]) for place in places])[:-1])
        for place, part in zip(places, parts, strict=True):
            found[place] = part
    return found


def with_each_masked(pretrained: Pretrained, protein: np.ndarray, most_tokens: int) -> Iterator[np.ndarray]:
    """The logarithms of the probabilities at each residue of a protein when that one is masked, [c, v] at a time.

    `protein`: its ids between its ends; copies of it make up at most `most_tokens` at once.
    """
    residues = np.arange(1, len(protein) + 1 - pretrained.num_ends)
    for some in np.array_split(residues, -(-len(residues) * len(protein) // most_tokens)):
        copies = np.repeat(protein[None], len(some), 0)
        copies[np.arange(len(some)), some] = pretrained.vocab.mask_id
        yield np.concatenate(log_probabilities(pretrained, list(copies), [np.array([place]) for place in some]))
