"""Every data-parallel rank holds everything; gradients are summed after the backward pass, or while it runs."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from megatron.parallel.data.sums import sum_partial
from megatron.parallel.mesh import Mesh
from megatron.parallel.waits import Mark, Waits


def materialise(stage: nn.Module, device: torch.device) -> None:
    """Give the parameters of a stage that is built on `meta` memory on the device, without values."""
    if any(parameter.is_meta for parameter in stage.parameters()):
        stage.to_empty(device=device)


class DataParallel:
    """The model's stages on one rank; of this kind each rank holds everything, and gradients are summed in the end.

    `parameters`: by name, this rank's share of each, with its placement. `is_gathered`: whether a pass gathers them, in
    the dtype of the products.
    """

    is_gathered = False

    def __init__(self, stages: Sequence[nn.Module], mesh: Mesh) -> None:
        self.parameters = {name: parameter for stage in stages for name, parameter in stage.named_parameters()}
        self._stages, self._replicas = stages, mesh.replicas

    def forward(self, stage: int, *args: Any) -> Any:
        """The stage's outputs."""
        return self._stages[stage](*args)

    def before_backward(self, stage: int, is_last: bool) -> None:
        """Called before each backward pass of a stage; `is_last`: its gradients are complete after this one."""

    def finish(self) -> None:
        """Bring the gradients of a step to their sums, after its last backward pass."""
        sum_partial(self.parameters, self._replicas)

    def drop_gathered(self) -> None:
        """Forget what was gathered of parameters that have been given other values since."""


class Overlapped(DataParallel):
    """The same, but that torch's DistributedDataParallel sums while the last backward pass runs."""

    def __init__(self, stages: Sequence[nn.Module], mesh: Mesh) -> None:
        super().__init__(stages, mesh)
        group = mesh.replicas.group
        self._summed = {number: DistributedDataParallel(stage, process_group=group, gradient_as_bucket_view=True)
                        for number, stage in enumerate(stages) if any(p.requires_grad for p in stage.parameters())}
        self._buckets = _Buckets(group, mesh.waits, len(self._summed))
        for stage in self._summed.values():
            stage.register_comm_hook(self._buckets, _sum_bucket)

    def forward(self, stage: int, *args: Any) -> Any:
        """The stage's outputs."""
        if stage not in self._summed:
            return super().forward(stage, *args)
        with self._summed[stage].no_sync():
            return self._summed[stage](*args)

    def before_backward(self, stage: int, is_last: bool) -> None:
        """Let the last backward pass, and no other, set the sums going."""
        if is_last and stage in self._summed:
            # What DistributedDataParallel does in its forward pass, which may lie several passes back.
            self._summed[stage].require_backward_grad_sync = True
            self._summed[stage].reducer.prepare_for_backward([])

    def finish(self) -> None:
        """The sums are there."""
        self._buckets.arrived()
        sum_partial(self.parameters)


class _Buckets:
    """The sums under way. The reducer keeps this for good, so that it must not lead back to the model."""

    def __init__(self, group: dist.ProcessGroup | None, waits: Waits | None, num_stages: int) -> None:
        self.group, self._waits, self._num_stages = group, waits, num_stages
        self._num_sent = 0  # stages whose sums are all under way
        self._last_began: Mark = None

    def is_last_of_stage(self) -> None:
        """Beside the last one of the last stage nothing is left to compute."""
        self._num_sent += 1
        if self._waits is not None and self._num_sent == self._num_stages:
            self._last_began = self._waits.begin()

    def arrived(self) -> None:
        """All of them have."""
        if self._waits is not None:
            self._waits.end(self._last_began)
        self._num_sent, self._last_began = 0, None


def _sum_bucket(buckets: _Buckets, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    work = dist.all_reduce(bucket.buffer(), group=buckets.group, async_op=True)
    if bucket.is_last():
        buckets.is_last_of_stage()
    return work.get_future().then(lambda future: future.value()[0])
