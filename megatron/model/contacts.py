"""A model's attention maps as they are made, and which residues touch, by ESM's regression on them.

Maps are weighed block by block and protein by protein as they are made: besides the contacts [r, r] of all proteins
memory holds the n maps of one block for one protein, however many blocks there are. Shapes: r residues of a protein, k
tokens of it, n heads of this tensor rank.
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
    """The probabilities [r, r] of a contact in each protein that is not empty, in order, on every tensor rank alike.

    `num_ends` says what is cut off: 1 where proteins have a token before them alone, 2 where they have one behind, too.
    The model is as for `watch_maps`. Raises ConfigError where it has no contact head. Each tensor rank weighs its own
    heads; their sums go over the axis once.
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
    """Run a model's blocks, each of which gives its attention maps to `takes`, with the number of its first head here.

    Heads are counted through all blocks. Of each protein that is not empty, in order, comes the map [n, k, k] (queries,
    keys; fp32), made when it is asked for. The model is whole, in evaluation and on one context rank.
    """
    assert not model.training and model.stream.context.size == 1, "maps are for evaluation, on one context rank"
    axis, num_heads = model.stream.axis, model.config.num_attention_heads
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # maps are as long as proteins are
        attentions = (module for block in model.blocks() for module in block.modules() if isinstance(module, Attention))
        for number, attention in enumerate(attentions):
            first = number * num_heads + axis.rank * (num_heads // axis.size)
            stack.enter_context(_watched(attention, partial(takes, first)))
        model.hidden(sequence)


@contextmanager
def _watched(attention: Attention, takes_maps: "partial[None]") -> Iterator[None]:
    """The context in which a block's maps go there."""
    attention.takes_maps = takes_maps
    try:
        yield
    finally:
        attention.takes_maps = None
