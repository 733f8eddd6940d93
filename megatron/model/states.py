"""Captures the hidden states between a model's blocks. Shapes: t tokens, h hidden."""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from megatron.model.protein_model import ProteinModel


@contextmanager
def watched_layers(model: ProteinModel, layers: Collection[int]) -> Iterator[dict[int, Tensor]]:
    """A context whose dictionary receives the hidden states [t, h] after each of `layers` when a whole model runs.

    Layers are counted as in ESM: 0 is the embeddings, n the output of the n-th block, and the last one the output of
    the final norm. They are in the model's dtype.
    """
    states: dict[int, Tensor] = {}
    modules: list[nn.Module] = [model.embedding, *list(model.blocks())[:-1], model.transformer.final_layernorm]

    def keep(layer: int, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        states[layer] = output

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(modules[layer].register_forward_hook(partial(keep, layer)).remove)
        yield states
