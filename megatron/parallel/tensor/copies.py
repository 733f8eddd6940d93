"""Copies of the weights in the dtype of the matrix products: made once an update, not once a micro-batch."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron.parallel.tensor.layers import Matrix


class ComputeCopies:
    """Gives each of `layers` a copy of its weight in `dtype`, if that is not its own; call `refresh` after updates.

    Not to what data-parallel ranks share out: those are gathered in `dtype`.
    """

    def __init__(self, layers: Iterable[Matrix], dtype: torch.dtype) -> None:
        self._layers = [layer for layer in layers
                        if layer.weight.dtype != dtype and not isinstance(layer.weight, DTensor)]
        for layer in self._layers:
            layer.copy = layer.weight.detach().to(dtype)

    def tensors(self) -> list[Tensor]:
        """The copies."""
        return [layer.copy for layer in self._layers if layer.copy is not None]

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the copies up to date."""
        if self._layers:
            torch._foreach_copy_(self.tensors(), [layer.weight for layer in self._layers])
