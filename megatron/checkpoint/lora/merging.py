"""Merges the low-rank adapters of a checkpoint into its weights."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from megatron.checkpoint.contents import Box, Checkpoint, StoredTensor, Tensors, one_piece
from megatron.config import ModelConfig
from megatron.config.declaration import with_tuples
from megatron.config.lora import LoraConfig
from megatron.errors import CheckpointError
from megatron.model.lora import adapted_layers, adapters_in
from megatron.parallel.tensor.adapters import Adapters, Pair, weight_of

STATE = "lora"  # the key in a checkpoint's state that holds the fields of LoraConfig


def merged(checkpoint: Checkpoint, model: ModelConfig) -> Checkpoint:
    """The checkpoint with its adapters added to the weights, lazily on reading; unchanged if it has no adapters.

    `model`: the configuration of its model. Raises CheckpointError if its state does not describe the adapters.
    """
    beside = adapters_in(checkpoint.model)
    if not beside:
        return checkpoint
    tensors = {name: tensor for name, tensor in checkpoint.model.items() if name not in beside}
    try:
        for layer, adapters in adapted_layers(model, LoraConfig(**with_tuples(checkpoint.state[STATE]))):
            pairs = [None if adapter is None else stored_pair(checkpoint.model, layer, part)
                     for part, adapter in zip(adapters.uses, adapters.of_parts(), strict=True)]
            tensors[f"{layer}.weight"] = _sum(tensors[f"{layer}.weight"], pairs, adapters)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint.path} has adapters, of which its state.json does not say all ({error}); "
                              "fine-tune again, or take what they were trained on") from None
    state = {name: value for name, value in checkpoint.state.items() if name != STATE}
    return replace(checkpoint, model=tensors, state=state)


def stored_pair(tensors: Tensors, layer: str, part: str) -> tuple[StoredTensor, StoredTensor]:
    """The stored A [r, i] and B [o, r] of one part of a layer (its queries, for example), for i inputs and o outputs.
    """
    a, b = (tensors[f"{layer}.adapters.{part}.{which}.weight"] for which in "ab")
    return a, b


def _sum(weight: StoredTensor, pairs: Sequence[tuple[StoredTensor, StoredTensor] | None], adapters: Adapters
         ) -> StoredTensor:
    """A layer's weight plus what its adapters add, computed on reading; a part without an adapter has None."""
    def read(box: Box) -> Tensor:
        found: list[Pair | None] = [None if pair is None else (pair[0].read(), pair[1].read()) for pair in pairs]
        return (weight.read() + weight_of(found, adapters.runs, adapters.scale))[box].contiguous()

    return one_piece(weight.shape, weight.dtype, read)
