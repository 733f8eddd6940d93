"""Copies of weights and biases as the matrix products take them: made once an update, not once a micro-batch."""

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor

from megatron.parallel.tensor.fp8 import weight_operands
from megatron.parallel.tensor.layers import Matrix


class ComputeCopies:
    """Gives each of `layers` copies of weight and bias in `dtype`, if it is another; call `refresh` after updates.

    The weights of layers that multiply in FP8 are in that, once for each direction.
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
        """Bring the copies up to date."""
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
