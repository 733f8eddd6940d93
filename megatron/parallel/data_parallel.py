"""Data parallelism by replication: gradients are summed over the data axis.

Sums, not means: the loss is already divided by the number of targets in the *global* batch.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from megatron.parallel.collectives import all_reduce_sum
from megatron.parallel.mesh import Axis
from megatron.parallel.sharding import partial_gradients

_BUCKET_ELEMENTS = 16 * 2**20  # 64 MiB of fp32: large enough for the network, small beside the model


class DataParallel:
    """A model whose gradients are summed over `axis`, and partial ones of the tensor axis over that.

    `implementation` "torch" sums while the last backward pass of a step runs (torch's DistributedDataParallel), "local"
    after it. Call the instance as the model itself.
    """

    def __init__(self, model: nn.Module, axis: Axis, implementation: str) -> None:
        self._parameters = list(model.parameters())
        self._axis = axis
        self._ddp: DistributedDataParallel | None = None
        if implementation == "torch" and axis.size > 1:
            self._ddp = DistributedDataParallel(model, process_group=axis.group, gradient_as_bucket_view=True)
            self._ddp.register_comm_hook(axis.group, _sum_bucket)
        self._model = self._ddp or model

    def __call__(self, *args: Any) -> Any:
        """The model's outputs."""
        return self._model(*args)

    def accumulating(self, is_last: bool) -> AbstractContextManager:
        """The context of one micro-batch's forward and backward pass; gradients are exchanged in the last one only."""
        return nullcontext() if self._ddp is None or is_last else self._ddp.no_sync()

    def finish(self) -> None:
        """Bring the gradients of a step to their sums, after its last backward pass."""
        if self._ddp is None and self._axis.size > 1:
            _sum_over(self._axis, (parameter.grad for parameter in self._parameters))
        for axis, gradients in partial_gradients(self._parameters).items():
            _sum_over(axis, gradients)


def _sum_bucket(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def _sum_over(axis: Axis, gradients: Iterable[torch.Tensor | None]) -> None:
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        all_reduce_sum(flat, axis)
        pieces = flat.split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [piece.view_as(g) for piece, g in zip(pieces, bucket, strict=True)])


def _buckets(gradients: Iterable[torch.Tensor | None]) -> list[list[torch.Tensor]]:
    """The gradients, in order, in lists of about `_BUCKET_ELEMENTS` elements."""
    buckets: list[list[torch.Tensor]] = [[]]
    size = 0
    for gradient in gradients:
        assert gradient is not None, "every parameter takes part in the loss"
        if size and size + gradient.numel() > _BUCKET_ELEMENTS:
            buckets.append([])
            size = 0
        buckets[-1].append(gradient)
        size += gradient.numel()
    return buckets
