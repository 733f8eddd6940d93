"""Replicated data parallelism: every rank holds all parameters; gradients are summed after or during the backward pass.
"""

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
    """Allocate the parameters of a stage built on `meta` on the device, without values."""
    if any(parameter.is_meta for parameter in stage.parameters()):
        stage.to_empty(device=device)


class DataParallel:
    """The model's stages on one rank, replicated over the data-parallel ranks; gradients are summed after the last
    backward pass. Also the interface of the other kinds.

    `parameters`: by name, this rank's shard of each, with its placement; the optimizer steps these. `is_gathered`:
    whether passes gather them from shards, in the compute dtype.
    """

    is_gathered = False

    def __init__(self, stages: Sequence[nn.Module], mesh: Mesh) -> None:
        self.parameters = {name: parameter for stage in stages for name, parameter in stage.named_parameters()}
        self._stages, self._replicas = stages, mesh.replicas

    def forward(self, stage: int, *args: Any) -> Any:
        """The outputs of stage number `stage` of this rank."""
        return self._stages[stage](*args)

    def before_backward(self, stage: int, is_last: bool) -> None:
        """Call before each backward pass of a stage; `is_last`: it is the step's last, which completes the gradients.
        """

    def reduce_gradients(self) -> None:
        """Sum the gradients over the ranks; call after the step's last backward pass."""
        sum_partial(self.parameters, self._replicas)

    def reshard(self) -> None:
        """Free gathered parameters; call when `parameters` were changed, so that the next pass gathers them anew."""


class Overlapped(DataParallel):
    """Replicated parameters whose gradients torch's DistributedDataParallel sums during the last backward pass."""

    def __init__(self, stages: Sequence[nn.Module], mesh: Mesh) -> None:
        super().__init__(stages, mesh)
        group = mesh.replicas.group
        self._summed = {
            number: DistributedDataParallel(_LastFirst(stage), process_group=group, gradient_as_bucket_view=True)
            for number, stage in enumerate(stages) if any(p.requires_grad for p in stage.parameters())}
        self._buckets = _Buckets(group, mesh.waits, len(self._summed))
        for stage in self._summed.values():
            # Left to itself, the reducer forms its buckets anew after the process's first step. A resumed run would
            # then differ from the unbroken one: an element's place in a bucket decides the order in which ranks add.
            stage.reducer._push_all_rebuilt_params()
            stage.reducer._rebuild_buckets()
            stage.register_comm_hook(self._buckets, _sum_bucket)

    def forward(self, stage: int, *args: Any) -> Any:
        """The outputs of stage number `stage` of this rank."""
        if stage not in self._summed:
            return super().forward(stage, *args)
        with self._summed[stage].no_sync():
            return self._summed[stage](*args)

    def before_backward(self, stage: int, is_last: bool) -> None:
        """Let the step's last backward pass, and no other, start the all-reduces."""
        if is_last and stage in self._summed:
            # DistributedDataParallel does this in its forward pass, which may lie several passes back.
            self._summed[stage].require_backward_grad_sync = True
            self._summed[stage].reducer.prepare_for_backward([])

    def reduce_gradients(self) -> None:
        """Wait for the all-reduces, and sum what DistributedDataParallel does not."""
        self._buckets.arrived()
        sum_partial(self.parameters)


class _LastFirst(nn.Module):
    """A stage that lists its last parameters first, about as the backward pass gives their gradients.

    Buckets in this order are complete, and their sums begin, one after another during the pass.
    """

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.reverse = nn.ParameterList(reversed(list(stage.parameters())))
        self.stage = stage

    def forward(self, *args: Any) -> Any:
        return self.stage(*args)


class _Buckets:
    """The buckets' all-reduces under way. The reducer holds it forever, so it must not refer to the model."""

    def __init__(self, group: dist.ProcessGroup | None, waits: Waits | None, num_stages: int) -> None:
        self.group, self._waits, self._num_stages = group, waits, num_stages
        self._num_sent = 0  # stages all of whose buckets are under way
        self._last_began: Mark = None

    def is_last_of_stage(self) -> None:
        """Note a stage's last bucket; after that of the last stage nothing is left to compute, and waiting begins."""
        self._num_sent += 1
        if self._waits is not None and self._num_sent == self._num_stages:
            self._last_began = self._waits.begin()

    def arrived(self) -> None:
        """Note that all buckets have arrived."""
        if self._waits is not None:
            self._waits.end(self._last_began)
        self._num_sent, self._last_began = 0, None


def _sum_bucket(buckets: _Buckets, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    work = dist.all_reduce(bucket.buffer(), group=buckets.group, async_op=True)
    if bucket.is_last():
        buckets.is_last_of_stage()
    return work.get_future().then(lambda future: future.value()[0])
