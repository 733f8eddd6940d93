"""Copies of weights and biases in the dtype of the matrix products: made once an update, not once a micro-batch."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron.parallel.tensor.layers import Matrix


class ComputeCopies:
    """Gives each of `layers` copies of weight and bias in `dtype`, if it is another; call `refresh` after updates.

    Not to what data-parallel ranks share out: those are gathered in `dtype`.
    """

    def __init__(self, layers: Iterable[Matrix], dtype: torch.dtype) -> None:
        self._layers = [layer for layer in layers
                        if layer.weight.dtype != dtype and not isinstance(layer.weight, DTensor)]
        for layer in self._layers:
            layer.copy = layer.weight.detach().to(dtype)
            bias = _bias_of(layer)
            layer.bias_copy = None if bias is None else bias.detach().to(dtype)

    def tensors(self) -> list[Tensor]:
        """The copies."""
        copies = (copy for layer in self._layers for copy in (layer.copy, layer.bias_copy))
        return [copy for copy in copies if copy is not None]

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the copies up to date."""
        if self._layers:
            originals = (original for layer in self._layers for original in (layer.weight, _bias_of(layer)))
            torch._foreach_copy_(self.tensors(), [original for original in originals if original is not None])


def _bias_of(layer: Matrix) -> Tensor | None:
    bias = getattr(layer, "bias", None)
    return bias if isinstance(bias, Tensor) else None
