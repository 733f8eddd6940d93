"""Hidden states between a model's blocks, as they pass. Shapes: t tokens, h hidden."""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from megatron.model.protein_model import ProteinModel


@contextmanager
def watched_layers(model: ProteinModel, layers: Collection[int]) -> Iterator[dict[int, Tensor]]:
    """Within, what a whole model makes behind each of `layers` goes into the dictionary: [t, h], in its dtype.

    As ESM counts them: 0 is the embeddings, n the stream behind block n, and the last what the final norm gives.
    """
    states: dict[int, Tensor] = {}
    modules: list[nn.Module] = [model.embedding, *list(model.blocks())[:-1], model.transformer.final_layernorm]

    def keep(layer: int, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        states[layer] = output

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(modules[layer].register_forward_hook(partial(keep, layer)).remove)
        yield states
