"""How much operations compute, and how many bytes they read and write: counters for `megatron.plan.memory_watch`.

An operation moves each tensor that it is given once, and each that it gives, changed or new, once; views, new memory
and collectives move nothing.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm: 0, _ATEN.bmm: 0, _ATEN.addmm: 1, _ATEN.baddbmm: 1}  # where the two matrices stand
# Operations for each pair of a query and a key, each head and each element of its width: two products forward, of which
# the backward pass repeats one and has four.
_ATTENTION = {_ATEN._flash_attention_forward: 4, _ATEN._flash_attention_backward: 10,
              _ATEN._efficient_attention_forward: 4, _ATEN._efficient_attention_backward: 10}


class WorkCounter:
    """`flops`: of matrix products and attention; `moved`: bytes that go through memory."""

    def __init__(self) -> None:
        self.flops = self.moved = 0

    def count(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], new: list[Tensor]) -> None:
        """Count an operation that is done."""
        self.moved += sum(tensor.numel() * tensor.element_size() for tensor in _moved(func, given, new))
        packet = func._overloadpacket
        if packet in _ATTENTION:
            # Boundaries of proteins, of queries and of keys: real ones, since they lie on the host.
            queries, keys = (value for value in args if isinstance(value, Tensor) and value.dtype == torch.int32)
            window = kwargs.get("window_size_left"), kwargs.get("window_size_right")
            with unset_fake_temporarily():
                num_pairs = _num_pairs(queries.diff().long(), keys.diff().long(), window)
            # Of queries, or of the context's gradient: where heads share keys, there are fewer of those.
            self.flops += _ATTENTION[packet] * num_pairs * args[0].shape[-2] * args[0].shape[-1]
        elif packet in _PRODUCTS:
            left, right = args[_PRODUCTS[packet]:][:2]
            self.flops += 2 * left.numel() * right.shape[-1]


class WeightBytes:
    """`num_bytes`: of the bytes that are moved those of tensors that have one of `shapes`, transposed or not.

    So it counts every cast of a weight, every product that reads one, and its gradient where it is computed, cast and
    added to. An activation must not have one of the shapes.
    """

    def __init__(self, shapes: Collection[tuple[int, ...]] = ()) -> None:
        self.num_bytes, self.shapes = 0, {tuple(sorted(shape)) for shape in shapes}

    def count(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], new: list[Tensor]) -> None:
        """Count an operation that is done."""
        self.num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in _moved(func, given, new)
                              if tuple(sorted(tensor.shape)) in self.shapes)


def _num_pairs(queries_g: Tensor, keys_g: Tensor, window: tuple[int | None, int | None]) -> int:
    """Pairs of a query and a key of the same protein no further apart than the window's ends; None is no end.

    Where a rank has only some of a protein's queries, each is counted with as many keys as one has on average.
    """
    pairs_g = keys_g + sum(_keys_beside(keys_g, width) for width in window)
    return int((queries_g * pairs_g // keys_g.clamp(min=1)).sum())


def _keys_beside(keys_g: Tensor, width: int | None) -> Tensor:
    """Of all tokens of each protein the keys on one side, of each token `width` at most."""
    width_g = (keys_g - 1).clamp(0, width)
    return width_g * keys_g - width_g * (width_g + 1) // 2


def _moved(func: Any, given: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    if func.namespace not in ("aten", "megatron") or func.is_view or "empty" in func.__name__:
        return []
    return [*{id(tensor): tensor for tensor in given}.values(), *new]
