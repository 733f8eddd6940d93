"""Computes a model's outputs for proteins: hidden states, their means, contacts, logits.

Shapes: r residues, h hidden, v tokens of the vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron.errors import ConfigError
from megatron.infer.rows import packed, shared_out, split, token_budget
from megatron.kernels.packed_sequence import PackedSequence
from megatron.model.contacts import contacts
from megatron.model.protein_model import ProteinModel
from megatron.model.states import watched_layers
from megatron.parallel.collectives import all_gather
from megatron.parallel.mesh import Mesh
from megatron.parallel.waits import read

OF_LAYERS = ("mean", "per_tok", "cls")
INCLUDED = (*OF_LAYERS, "contacts", "logits")

Answer = dict[str, np.ndarray]


@dataclass(frozen=True)
class Asked:
    """What is wanted of each protein: some of INCLUDED, those of OF_LAYERS for each of `layers`.

    Layers count as ESM has it: 0 the embeddings, n the stream behind block n, the last behind the final norm; -1 is the
    last, -2 the one before. An answer has for each name an array in fp32:

    - mean [layers, h], over the residues; per_tok [layers, r, h]; cls [layers, h], of the token before the first
    - contacts [r, r], the probability that two residues touch
    - logits [r, v], v the tokens of the vocabulary in its order
    """

    include: tuple[str, ...] = ("mean",)
    layers: tuple[int, ...] = (-1,)

    def resolved(self, num_layers: int, has_contacts: bool) -> "Asked":
        """A copy whose layers count from 0; raises ConfigError for a layer that the model lacks, and for contacts if it
        has no contact head.
        """
        for name in self.include:
            if name not in INCLUDED:
                raise ConfigError(f"include has {name!r}; it may have {', '.join(INCLUDED)}")
        if "contacts" in self.include and not has_contacts:
            raise ConfigError("contacts need a regression on attention maps, which this model has not; fit one: "
                              "tools/predict_contacts.py --fit")
        for layer in self.layers:
            if not -num_layers - 1 <= layer <= num_layers:
                raise ConfigError(f"layer {layer} is asked for, and the model has {num_layers}: from 0, the embeddings "
                                  f"alone, to {num_layers}, or from the end, -1 the last")
        return Asked(self.include, tuple(layer % (num_layers + 1) for layer in self.layers))

    @property
    def watched(self) -> tuple[int, ...]:
        """The layers whose hidden states are needed."""
        return self.layers if set(OF_LAYERS) & set(self.include) else ()


@torch.no_grad()
def answers(model: ProteinModel, mesh: Mesh, proteins: Sequence[np.ndarray], num_ends: int, num_tokens: int,
            asked: Asked, budget: int | None = None) -> list[Answer]:
    """The outputs for each protein, in the order of `proteins`, which are ids with the tokens at their ends.

    `num_ends`: tokens around a protein, 1 (before it) or 2. `num_tokens`: size of the vocabulary without padding.
    `asked` must be resolved. `budget`: tokens in a row; None for as many as memory allows. All tensor ranks must call
    this together; each gets the same result.
    """
    found = list[Answer]([{}] * len(proteins))
    budget = token_budget(budget, model.config, len(asked.watched), mesh)
    for places in shared_out([len(ids) for ids in proteins], budget):
        row = packed([proteins[place] for place in places], mesh.device)
        for place, answer in zip(places, _of_row(model, mesh, row, num_ends, num_tokens, asked), strict=True):
            found[place] = answer
    return found


def _of_row(model: ProteinModel, mesh: Mesh, row: PackedSequence, num_ends: int, num_tokens: int,
            asked: Asked) -> Iterator[Answer]:
    """The outputs for each protein of one row."""
    last = model.config.num_layers
    needs_last = "logits" in asked.include
    named: dict[str, list[np.ndarray]] = {}
    with watched_layers(model, {*asked.watched, *([last] if needs_last else [])}) as states:
        if "contacts" in asked.include:
            named["contacts"] = [read(map_rr).numpy() for map_rr in contacts(model, row, num_ends)]
        else:
            model.hidden(row)
    if needs_last:
        logits_tv = all_logits(model, states[last], mesh, num_tokens)
        named["logits"] = [_residues(part, num_ends) for part in split(read(logits_tv.float()), row)]
    if asked.watched:
        stacked_tlh = read(torch.stack([states[layer] for layer in asked.layers], 1).float())
        parts = split(stacked_tlh, row)
        if "mean" in asked.include:
            named["mean"] = [_residues(part, num_ends).mean(0) for part in parts]
        if "per_tok" in asked.include:
            named["per_tok"] = [_residues(part, num_ends).transpose(1, 0, 2) for part in parts]
        if "cls" in asked.include:
            named["cls"] = [part[0].numpy() for part in parts]
    for number in range(len(row.cu_seqlens) - 1):
        yield {name: named[name][number] for name in asked.include}


def all_logits(model: ProteinModel, hidden_mh: Tensor, mesh: Mesh, num_tokens: int) -> Tensor:
    """Logits [m, v] of hidden states [m, h], the same on every tensor rank.

    Ids that only pad the vocabulary are left out. Training includes them in its softmax, as Megatron-LM does, but other
    formats drop them, and a checkpoint must give the same results in every format. Raises ConfigError for a model
    without a masked-LM head.
    """
    check_head(model)
    logits_mv = model.logits(hidden_mh)
    rows_a_rank = len(model.lm_head.bias)  # the last ranks may have fewer ids than rows, or none
    filled_mv = F.pad(logits_mv, (0, rows_a_rank - logits_mv.shape[1]))
    return all_gather(filled_mv.T.contiguous(), mesh.tensor).T[:, :num_tokens]


def check_head(model: ProteinModel) -> None:
    """Raises ConfigError for a model without a masked-LM head, such as a fine-tuned one."""
    if not hasattr(model, "lm_head"):
        raise ConfigError("what residues are likely is asked of a fine-tuned model, which has no masked-LM head; ask "
                          "the one that it was begun from")


def _residues(values_t: Tensor, num_ends: int) -> np.ndarray:
    """The values of a protein's residues, without those of the tokens at its ends."""
    return values_t[1:len(values_t) + 1 - num_ends].numpy()
