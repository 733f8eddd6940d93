"""Data parallelism: gradients are summed over the ranks that see other tokens, on each of them or on a share of each.

Sums, not means: the loss is already divided by the number of targets in the *global* batch. Gradients are fp32, and
summed in fp32; frozen parameters have none. Each way offers the same: the parameters that the optimizer steps, and what
is due at each backward pass.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from megatron.config import ParallelConfig
from megatron.parallel.collectives import all_reduce_sum
from megatron.parallel.mesh import Axis, Mesh
from megatron.parallel.parameters import inherit
from megatron.parallel.placement import partial_gradients, placement_of

BUCKET_ELEMENTS = 16 * 2**20  # 64 MiB of fp32: large enough for the network, small beside the model

Blocks = Callable[[Any], Iterable[nn.Module]]


class DataParallel(Protocol):
    """The model's stages on one rank. `parameters`: by name, this rank's share of each, with its placement."""

    parameters: dict[str, nn.Parameter]

    def forward(self, stage: int, *args: Any) -> Any:
        """The stage's outputs."""

    def before_backward(self, stage: int, is_last: bool) -> None:
        """Called before each backward pass of a stage; `is_last`: its gradients are complete after this one."""

    def finish(self) -> None:
        """Bring the gradients of a step to their sums, after its last backward pass."""


def data_parallel(stages: Sequence[nn.Module], blocks: Blocks, mesh: Mesh, config: ParallelConfig,
                  dtype: torch.dtype) -> DataParallel:
    """The way that `config` asks for; `blocks` names the parts of a stage that are shared out and gathered one by one.

    The stages hold their initial weights already, and go to the mesh's device. Where parameters are gathered, it is in
    `dtype`, that of the products. On one rank there is nothing to share out.
    """
    if config.data_parallel_sharding != "none" and mesh.shards.size > 1:
        return Sharded(stages, blocks, mesh, config.data_parallel_sharding, dtype)
    for stage in stages:
        if any(parameter.device != mesh.device for parameter in stage.parameters()):  # a dry run's cannot be moved
            stage.to(mesh.device)
    if config.DDP_impl == "torch" and mesh.replicas.size > 1:
        return Overlapped(stages, mesh)
    return Replicated(stages, mesh)


class Replicated:
    """Every rank holds everything; gradients are summed after the last backward pass."""

    def __init__(self, stages: Sequence[nn.Module], mesh: Mesh) -> None:
        self.parameters = {name: parameter for stage in stages for name, parameter in stage.named_parameters()}
        self._stages, self._axis = stages, mesh.replicas

    def forward(self, stage: int, *args: Any) -> Any:
        """The stage's outputs."""
        return self._stages[stage](*args)

    def before_backward(self, stage: int, is_last: bool) -> None:
        """Nothing is due."""

    def finish(self) -> None:
        """Sum the gradients."""
        if self._axis.size > 1:
            _sum_over(self._axis, (parameter.grad for parameter in self.parameters.values() if parameter.requires_grad))
        _sum_partial(self.parameters)


class Overlapped:
    """Every rank holds everything; torch's DistributedDataParallel sums while the last backward pass runs."""

    def __init__(self, stages: Sequence[nn.Module], mesh: Mesh) -> None:
        self.parameters = {name: parameter for stage in stages for name, parameter in stage.named_parameters()}
        group = mesh.replicas.group
        self._stages = list(stages)
        self._summed = {number: DistributedDataParallel(stage, process_group=group, gradient_as_bucket_view=True)
                        for number, stage in enumerate(stages) if any(p.requires_grad for p in stage.parameters())}
        for stage in self._summed.values():
            stage.register_comm_hook(group, _sum_bucket)

    def forward(self, stage: int, *args: Any) -> Any:
        """The stage's outputs."""
        if stage not in self._summed:
            return self._stages[stage](*args)
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
        _sum_partial(self.parameters)


class Sharded:
    """Ranks share out what each would repeat (ZeRO: Rajbhandari et al., 2020, arXiv 1910.02054), by torch's FSDP2.

    "optimizer": gradients are kept whole until the last micro-batch, then each rank gets the sum of its share and steps
    it, and the new parameters are gathered when they are next used. "gradients": each rank gets its share after every
    micro-batch. "parameters": those, too, are gathered block by block where they are used, and dropped behind it.
    Masters and sums are fp32; what is gathered is in the dtype of the products.
    """

    def __init__(self, stages: Sequence[nn.Module], blocks: Blocks, mesh: Mesh, sharding: str,
                 dtype: torch.dtype) -> None:
        self._sharding = sharding
        self._stages = stages
        device_mesh = _device_mesh(mesh)
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        self.parameters, self._sources = {}, []
        for stage in stages:
            wholes = dict(stage.named_parameters())
            for unit in [*blocks(stage), stage]:
                fully_shard(unit, mesh=device_mesh, mp_policy=precision,
                            reshard_after_forward=sharding == "parameters")
                assert isinstance(unit, FSDPModule)
                unit.set_gradient_divide_factor(1.0)
                unit.set_force_sum_reduction_for_comms(True)
            for name, source in stage.named_parameters():
                assert isinstance(source, DTensor)
                self.parameters[name] = _share(source, wholes[name], mesh.shards)
                if source.requires_grad:
                    self._sources.append((source, self.parameters[name]))

    def forward(self, stage: int, *args: Any) -> Any:
        """The stage's outputs."""
        return self._stages[stage](*args)

    def before_backward(self, stage: int, is_last: bool) -> None:
        """Say what becomes of the gradients and of the whole parameters behind this pass."""
        module = self._stages[stage]
        assert isinstance(module, FSDPModule)
        module.set_requires_gradient_sync(is_last or self._sharding != "optimizer")
        module.set_requires_all_reduce(is_last)
        module.set_reshard_after_backward(is_last or self._sharding == "parameters")

    def finish(self) -> None:
        """Hand each share's gradient to the parameter that the optimizer steps."""
        for source, share in self._sources:
            assert isinstance(source.grad, DTensor), "every parameter that is trained takes part in the loss"
            share.grad = source.grad.to_local()
            source.grad = None
        _sum_partial(self.parameters)


def _share(source: DTensor, whole: nn.Parameter, shards: Axis) -> nn.Parameter:
    """This rank's share of `whole`, in the memory that FSDP2 keeps it in."""
    share = nn.Parameter(source.to_local().detach(), whole.requires_grad)
    inherit(share, whole)
    share.placement = replace(placement_of(whole), shards=shards, num_rows=len(whole))  # type: ignore[attr-defined]
    return share


def _device_mesh(mesh: Mesh) -> DeviceMesh:
    kind, shards, copies = mesh.device.type, mesh.shards.group, mesh.copies.group
    assert shards is not None
    if copies is None:
        return DeviceMesh.from_group(shards, kind, mesh_dim_names=("shards",))
    line = torch.tensor(dist.get_process_group_ranks(mesh.replicas.group))
    return DeviceMesh.from_group([copies, shards], kind, mesh=line.view(-1, mesh.shards.size),
                                 mesh_dim_names=("copies", "shards"))


def _sum_partial(parameters: dict[str, nn.Parameter]) -> None:
    for axis, gradients in partial_gradients(parameters.values()).items():
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
    """The gradients, in order, in lists of about `BUCKET_ELEMENTS` elements."""
    buckets: list[list[torch.Tensor]] = []
    size = 0
    for gradient in gradients:
        assert gradient is not None, "every parameter that is trained takes part in the loss"
        if not buckets or size + gradient.numel() > BUCKET_ELEMENTS:
            buckets.append([])
            size = 0
        buckets[-1].append(gradient)
        size += gradient.numel()
    return buckets
