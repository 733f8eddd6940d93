"""Sums gradients over the ranks of an axis, in buckets; fp32, never averaged."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from megatron.parallel.collectives import all_reduce_sum
from megatron.parallel.mesh import ONE_RANK_AXIS, Axis
from megatron.parallel.placement import partial_gradients

T = TypeVar("T")
BUCKET_ELEMENTS = 16 * 2**20  # 64 MiB of fp32: large enough for the network, small compared with the model


def sum_partial(parameters: dict[str, nn.Parameter], replicas: Axis = ONE_RANK_AXIS) -> None:
    """All-reduce, in place, the gradients of which each rank has a part: over `replicas`, tensor ranks, pipeline ends.
    """
    for axis, gradients in partial_gradients(parameters.values(), replicas).items():
        for bucket in in_buckets(gradients, Tensor.numel):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            all_reduce_sum(flat, axis)
            pieces = flat.split([gradient.numel() for gradient in bucket])
            torch._foreach_copy_(bucket, [piece.view_as(g) for piece, g in zip(pieces, bucket, strict=True)])


def in_buckets(things: Iterable[T], size_of: Callable[[T], int]) -> list[list[T]]:
    """The things, in order, in lists of about `BUCKET_ELEMENTS` elements; a larger thing has a list of its own."""
    buckets: list[list[T]] = []
    room = 0
    for thing in things:
        if not buckets or size_of(thing) > room:
            buckets.append([])
            room = BUCKET_ELEMENTS
        buckets[-1].append(thing)
        room -= size_of(thing)
    return buckets
