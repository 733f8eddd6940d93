"""Low-rank adapters of layers that are split over the tensor axis (LoRA: Hu et al., 2021, arXiv 2106.09685).

An adapter adds s · B A x to the output of a frozen layer. Of A and B the matrix on the side of the residual stream is
whole on every rank, and the other is split like the layer's weight: so the ranks exchange only r features per token,
and each rank can merge its part of s · B A into its part of the weight. Shapes as in `layers`: t tokens, u of them in
the stream on this rank, i and o features in and out; r the adapter's rank.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron.kernels.dropout import Dropout, Use
from megatron.parallel.parameters import Constant, Uniform, declaration_of
from megatron.parallel.placement import placement_of
from megatron.parallel.tensor.layers import ColumnParallelLinear, Linear, RowParallelLinear

Pair = tuple[Tensor, Tensor]  # A [r, i], B [o, r]
SplitLinear = ColumnParallelLinear | RowParallelLinear


class Adapters(nn.Module):
    """The adapters of one layer: one, or one for each of several parts whose output features are interleaved (q, k, v).

    `uses`: the parts' names, in order, and the `Use` that makes each part's dropout different. `adapted`: the parts
    that get an adapter. `scale`: s. `rate`: of the dropout of x. With dropout, `take_seed` is called before each
    forward pass of the layer's block.
    """

    def __init__(self, layer: SplitLinear, uses: Mapping[str, Use], adapted: frozenset[str], rank: int, scale: float,
                 rate: float) -> None:
        super().__init__()
        self.runs, self.uses, self.scale, self.rate = declaration_of(layer.weight).runs, uses, scale, rate
        self.seed: Tensor | None = None
        num_out = placement_of(layer.weight).whole_shape(layer.weight)[0]
        shares = self.runs or (1,)
        for name, share in zip(uses, shares, strict=True):
            self.add_module(name, Adapter(layer, num_out * share // sum(shares), rank) if name in adapted else None)

    def take_seed(self, block: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Keep the seed of dropout from the arguments of the block's forward pass."""
        self.seed = arguments[1].seed

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the layer's output for input `x`, in the output's shape."""
        return in_turns([None if adapter is None else adapter(x, self.scale, self._dropout(use))
                         for adapter, use in zip(self.of_parts(), self.uses.values(), strict=True)], self.runs)

    def of_parts(self) -> list["Adapter | None"]:
        """Each part's adapter, None for a part without one."""
        return [getattr(self, name) for name in self.uses]

    def _dropout(self, use: Use) -> Dropout | None:
        if not self.rate or not self.training:
            return None
        assert self.seed is not None, "training with dropout needs a seed"
        return Dropout(self.rate, self.seed, use)


class Adapter(nn.Module):
    """s · B A x for `num_out` of a layer's output features. Initially 0: A is drawn like torch.nn.Linear's weight, B is
    0."""

    def __init__(self, layer: SplitLinear, num_out: int, rank: int) -> None:
        super().__init__()
        num_in = placement_of(layer.weight).whole_shape(layer.weight)[1]
        drawn, zero = Uniform(num_in**-0.5), Constant(0.0)
        if isinstance(layer, RowParallelLinear):
            self.a: Linear | RowParallelLinear = RowParallelLinear(num_in, rank, layer.stream, drawn, has_bias=False)
            self.b: Linear | ColumnParallelLinear = Linear(rank, num_out, zero, False, layer.stream)
            self.dropped: Callable[[Tensor, Dropout | None], Tensor] = layer.stream.dropout_of_features
        else:
            self.a = Linear(num_in, rank, drawn, False, layer.stream)
            self.b = ColumnParallelLinear(rank, num_out, layer.stream, zero, has_bias=False)
            self.dropped = layer.stream.dropout

    def forward(self, x: Tensor, scale: float, dropout: Dropout | None) -> Tensor:
        """[t, o], or [u, o] of a layer that leads back into the stream. `dropout`: applied to x."""
        return self.b(scale * self.a(self.dropped(x, dropout)))


def weight_of(pairs: Sequence[Pair | None], runs: tuple[int, ...], scale: float) -> Tensor:
    """What a layer's adapters add to its weight [o, i], fp32; `pairs`: A and B of each part, None for one without."""
    products = [None if pair is None else (pair[1] @ pair[0]).t() for pair in pairs]
    return scale * in_turns(products, runs).t()


def in_turns(parts: Sequence[Tensor | None], runs: tuple[int, ...]) -> Tensor:
    """The parts' features interleaved [..., o], `runs[n]` of part n at a time; zeros for a part that is None."""
    known = next((part, run) for part, run in zip(parts, runs or (1,), strict=True) if part is not None)
    if not runs:
        return known[0]
    leading = (*known[0].shape[:-1], known[0].shape[-1] // known[1])
    return torch.cat([known[0].new_zeros(*leading, run) if part is None else part.unflatten(-1, (-1, run))
                      for part, run in zip(parts, runs, strict=True)], -1).flatten(-2)
