"""Copies of weights and biases in the compute dtype, made once per update instead of once per micro-batch."""

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor

from megatron.parallel.tensor.fp8 import weight_operands
from megatron.parallel.tensor.layers import Matrix


class ComputeCopies:
    """Gives each of `layers` copies of its weight and bias in `dtype` if that is not their own; call `refresh` after
    updates.

    Layers with an FP8 recipe get their weight in FP8 instead, once for the forward and once for the backward product.
    """

    def __init__(self, layers: Iterable[Matrix], dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._layers = [layer for layer in layers if layer.weight.dtype != dtype]
        for layer in self._layers:
            if layer.recipe is not None:
                layer.fp8_copy = weight_operands(layer.weight, layer.recipe, dtype)
            else:
                layer.copy = layer.weight.detach().to(dtype)
            bias = _bias_of(layer)
            layer.bias_copy = None if bias is None or layer.recipe is not None else bias.detach().to(dtype)

    @torch.no_grad()
    def refresh(self) -> None:
        """Recompute the copies, in place, from the present weights."""
        pairs = [(copy, original) for layer in self._layers
                 for copy, original in ((layer.copy, layer.weight), (layer.bias_copy, _bias_of(layer)))
                 if copy is not None and original is not None]
        if pairs:
            torch._foreach_copy_([copy for copy, _ in pairs], [original for _, original in pairs])
        for layer in self._layers:
            if layer.recipe is not None:
                made = weight_operands(layer.weight, layer.recipe, self._dtype)
                for copy, new in zip(chain(*layer.fp8_copy or ()), chain(*made), strict=True):
                    copy.copy_(new)


def _bias_of(layer: Matrix) -> Tensor | None:
    bias = getattr(layer, "bias", None)
    return bias if isinstance(bias, Tensor) else None
