"""Sharded data parallelism, by torch's FSDP2."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from megatron.parallel.data.replicated import DataParallel, materialise
from megatron.parallel.data.sums import sum_partial
from megatron.parallel.mesh import Axis, Mesh
from megatron.parallel.parameters import inherit
from megatron.parallel.placement import placement_of
from megatron.parallel.waits import Waits


class Sharded(DataParallel):
    """Shards optimizer state, gradients or parameters over the ranks.

    As in ZeRO (Rajbhandari et al., 2020, arXiv 1910.02054). `sharding` "optimizer": gradients stay whole until the
    step's last micro-batch and are then reduce-scattered; each rank steps its shard, and the next forward pass gathers
    the new parameters. "gradients": they are reduce-scattered after every micro-batch. "parameters": parameters are
    also gathered block by block where they are used, and freed after that. Master parameters and gradient sums are
    fp32, gathered parameters in `dtype`.
    """

    is_gathered = True

    def __init__(self, stages: Sequence[nn.Module], blocks: Callable[[Any], Iterable[nn.Module]], mesh: Mesh,
                 sharding: str, dtype: torch.dtype) -> None:
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
                if mesh.waits is not None:
                    _count_waits(unit, mesh.waits)
            materialise(stage, mesh.device)
            for name, source in stage.named_parameters():
                assert isinstance(source, DTensor)
                self.parameters[name] = _share(source, wholes[name], mesh.shards)
                if source.requires_grad:
                    self._sources.append((source, self.parameters[name]))

    def before_backward(self, stage: int, is_last: bool) -> None:
        """Tell FSDP2 whether this pass reduce-scatters the gradients and frees the gathered parameters after it."""
        module = self._stages[stage]
        assert isinstance(module, FSDPModule)
        module.set_requires_gradient_sync(is_last or self._sharding != "optimizer")
        module.set_requires_all_reduce(is_last)
        module.set_reshard_after_backward(is_last or self._sharding == "parameters")

    def reduce_gradients(self) -> None:
        """Give each shard's gradient to the parameter that the optimizer steps, and sum what FSDP2 does not."""
        for source, share in self._sources:
            assert isinstance(source.grad, DTensor), "every parameter that is trained takes part in the loss"
            share.grad = source.grad.to_local()
            source.grad = None
        sum_partial(self.parameters)

    def reshard(self) -> None:
        """Free the gathered parameters: the next pass gathers the shards anew."""
        for module in (module for stage in self._stages for module in stage.modules()):
            if isinstance(module, FSDPModule):
                module.reshard()


def _count_waits(unit: FSDPModule, waits: Waits) -> None:
    """Count the time FSDP2 waits in a unit, including its copies, by wrapping its methods: torch has no hook for it."""
    state: Any = unit._get_fsdp_state()
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    for group in filter(None, groups):
        for name in ("unshard", "wait_for_unshard", "post_backward", "finalize_backward"):
            setattr(group, name, partial(waits.during, getattr(group, name)))


def _share(source: DTensor, whole: nn.Parameter, shards: Axis) -> nn.Parameter:
    """This rank's shard of `whole`, in FSDP2's own memory."""
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
