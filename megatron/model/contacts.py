"""Predicts residue contacts from a model's attention maps, by ESM's logistic regression; gives access to the maps.

Each map is used as soon as it is computed, block by block and protein by protein: besides the contacts [r, r] of all
proteins memory holds only the n maps of one block for one protein. Shapes: r residues of a protein, k tokens of it, n
heads of this tensor rank.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from megatron.errors import ConfigError
from megatron.kernels.packed_sequence import PackedSequence, protein_lengths
from megatron.model.attention import Attention
from megatron.model.protein_model import ProteinModel
from megatron.parallel.collectives import all_reduce_sum


@torch.no_grad()
def contacts(model: ProteinModel, sequence: PackedSequence, num_ends: int) -> list[Tensor]:
    """The contact probabilities [r, r] of each protein that is not empty, in order, the same on every tensor rank.

    `num_ends`: 1 if proteins have a special token before them only, 2 if also one after; these are cut off. The model
    is as for `watch_maps`. Each tensor rank sums over its own heads, and one all-reduce adds the ranks' sums. Raises
    ConfigError if the model has no contact head.
    """
    if not model.config.contact_head:
        raise ConfigError("contacts need the model's regression on attention maps, and --contact-head is off: take a "
                          "model that has one, such as ESM's")
    sizes = [max(length - num_ends, 0) for length in protein_lengths(sequence.cu_seqlens, sequence.num_filler)]
    flat = torch.zeros(sum(size**2 for size in sizes), device=sequence.tokens_t.device)
    parts = flat.split([size**2 for size in sizes])
    logits = [part.view(size, size) for part, size in zip(parts, sizes, strict=True)]

    def weigh(first: int, maps: Iterator[Tensor]) -> None:
        for logits_rr, map_nkk in zip(logits, maps, strict=True):
            residues = slice(1, 1 + len(logits_rr))
            logits_rr += model.contact_head(map_nkk[:, residues, residues], first)

    watch_maps(model, sequence, weigh)
    all_reduce_sum(flat, model.stream.axis).add_(model.contact_head.bias).sigmoid_()
    return logits


@torch.no_grad()
def watch_maps(model: ProteinModel, sequence: PackedSequence, takes: Callable[[int, Iterator[Tensor]], None]) -> None:
    """Run a model, calling `takes(first, maps)` in each block.

    `first`: the number of this rank's first head in the block, counted through all blocks. `maps`: for each protein
    that is not empty, in order, its attention map [n, k, k] (queries, keys; fp32), computed when the iterator reaches
    it. The model is whole, in evaluation mode and on one context rank.
    """
    assert not model.training and model.stream.context.size == 1, "maps are for evaluation, on one context rank"
    axis, num_heads = model.stream.axis, model.config.num_attention_heads
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # each map has another shape
        attentions = (module for block in model.blocks() for module in block.modules() if isinstance(module, Attention))
        for number, attention in enumerate(attentions):
            first = number * num_heads + axis.rank * (num_heads // axis.size)
            stack.enter_context(_watched(attention, partial(takes, first)))
        model.hidden(sequence)


@contextmanager
def _watched(attention: Attention, takes_maps: "partial[None]") -> Iterator[None]:
    """A context in which a block's attention passes its maps to `takes_maps`."""
    attention.takes_maps = takes_maps
    try:
        yield
    finally:
        attention.takes_maps = None
