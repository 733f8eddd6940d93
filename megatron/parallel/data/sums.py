"""Gradients summed over the ranks of an axis, in buckets: sums of fp32, never means."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from megatron.parallel.collectives import all_reduce_sum
from megatron.parallel.mesh import Axis
from megatron.parallel.placement import partial_gradients

BUCKET_ELEMENTS = 16 * 2**20  # 64 MiB of fp32: large enough for the network, small beside the model


def sum_over(axis: Axis, gradients: Iterable[Tensor | None]) -> None:
    """Sum gradients in place over the axis."""
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        all_reduce_sum(flat, axis)
        pieces = flat.split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [piece.view_as(g) for piece, g in zip(pieces, bucket, strict=True)])


def sum_partial(parameters: dict[str, nn.Parameter]) -> None:
    """Sum the gradients of which each tensor rank, or each end of the pipeline, has only a part."""
    for axis, gradients in partial_gradients(parameters.values()).items():
        sum_over(axis, gradients)


def _buckets(gradients: Iterable[Tensor | None]) -> list[list[Tensor]]:
    """The gradients, in order, in lists of about `BUCKET_ELEMENTS` elements."""
    buckets: list[list[Tensor]] = []
    size = 0
    for gradient in gradients:
        assert gradient is not None, "every parameter that is trained takes part in the loss"
        if not buckets or size + gradient.numel() > BUCKET_ELEMENTS:
            buckets.append([])
            size = 0
        buckets[-1].append(gradient)
        size += gradient.numel()
    return buckets
