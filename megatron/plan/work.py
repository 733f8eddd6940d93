"""Counters of arithmetic and memory traffic, for `megatron.plan.memory_watch`.

An operation is assumed to read each input tensor once and to write each output, changed or new, once; views,
allocations and collectives move nothing.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm: 0, _ATEN.bmm: 0, _ATEN.addmm: 1, _ATEN.baddbmm: 1, _ATEN._scaled_mm: 0,
             _ATEN._scaled_mm_v2: 0}  # the index of the first of the two matrices among the arguments
# FLOPs for each pair of a query and a key, each head and each element of its width. The forward pass has two matrix
# products. FlashAttention's backward pass has four, and repeats one; ours, without atomic additions, repeats three.
_ATTENTION = {"torch_attn::_varlen_attn": 4, "torch_attn::_varlen_attn_backward": 10,
              "megatron::fused_attention": 4, "megatron::fused_attention_backward": 14}
_IN_MEMORY = ("aten", "megatron", "torch_attn")  # namespaces of operations other than collectives


class WorkCounter:
    """Counts `flops` of matrix products and attention, `fp8_flops` (those of them in FP8), and `moved` bytes."""

    def __init__(self) -> None:
        self.flops = self.fp8_flops = self.moved = 0

    def count(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], new: list[Tensor]) -> None:
        """Count an operation; `given` and `new`: its input and output tensors."""
        self.moved += sum(tensor.nbytes for tensor in _moved(func, given, new))
        name, packet = func.name(), func._overloadpacket
        if name in _ATTENTION:
            context = new[0] if _ATTENTION[name] == 4 else args[0]  # or its gradient
            with unset_fake_temporarily():
                num_pairs = _num_pairs(args, kwargs, len(context))
            self.flops += _ATTENTION[name] * num_pairs * math.prod(context.shape[1:])
        elif packet in _PRODUCTS:
            left, right = args[_PRODUCTS[packet]:][:2]
            flops = 2 * left.numel() * right.shape[-1]
            self.flops += flops
            self.fp8_flops += flops if left.element_size() == 1 else 0


class WeightBytes:
    """Counts `num_bytes`, the bytes moved of tensors whose sorted shape is in `shapes`: weights and their gradients.

    So every cast of a weight, every product that reads one, and every computation, cast and addition of its gradient
    counts. No activation may have one of the shapes.
    """

    def __init__(self) -> None:
        self.num_bytes, self.shapes = 0, set[tuple[int, ...]]()

    def count(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], new: list[Tensor]) -> None:
        """Count an operation; `given` and `new`: its input and output tensors."""
        self.num_bytes += sum(tensor.nbytes for tensor in _moved(func, given, new)
                              if tuple(sorted(tensor.shape)) in self.shapes)


def _num_pairs(args: Any, kwargs: Any, num_queries: int) -> int:
    """The number of pairs of a query and a key of the same protein, and within the window if there is one.

    The boundaries of proteins have values, since they are on the host. If a rank has only some of a protein's queries,
    each counts with the average number of keys.
    """
    ends = [value for value in args if isinstance(value, Tensor) and value.dtype == torch.int32]
    if len(ends) == 1:  # our operator: boundaries of keys, of which filler takes no part; queries begin at `first`
        num_filler, first, *window = [value for value in args if type(value) is int][:4]
        keys = ends[0][:len(ends[0]) - num_filler]
        ends = [(keys - first).clamp(0, num_queries), keys]
    else:
        window = next((list(value) for value in (*args, *kwargs.values()) if isinstance(value, list | tuple)), [-1, -1])
    queries_g, keys_g = (boundaries.diff().long() for boundaries in ends)
    pairs_g = keys_g + sum(_keys_beside(keys_g, width) for width in window)
    return int((queries_g * pairs_g // keys_g.clamp(min=1)).sum())


def _keys_beside(keys_g: Tensor, width: int) -> Tensor:
    """For each protein, the number of keys on one side of its tokens, summed: at most `width` each, or all if negative.
    """
    width_g = (keys_g - 1).clamp(0, None if width < 0 else width)
    return width_g * keys_g - width_g * (width_g + 1) // 2


def _moved(func: Any, given: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    """The tensors that an operation reads and writes."""
    if func.namespace not in _IN_MEMORY or func.is_view or "empty" in func.__name__:
        return []
    return [*{id(tensor): tensor for tensor in given}.values(), *new]
