"""What Muon sends, computes and takes after the passes of a step: of the matrices as `megatron.parallel.matrices`
shares them out among the ranks that hold their parts.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import cache

import torch
from torch import Tensor

from megatron.config import OptimizerConfig
from megatron.kernels.newton_schulz.orthogonal import num_flops, working_dtype
from megatron.optim.muon import Muon
from megatron.parallel.matrices.sharing import Round, num_beside, rounds_of, shared_out
from megatron.parallel.mesh import Axis, Mesh, build_axis
from megatron.parallel.parameters import declaration_of
from megatron.parallel.placement import placement_of
from megatron.parallel.traffic import EXCHANGE, Traffic
from megatron.plan.memory_watch import MemoryWatch
from megatron.plan.parameters import Held, matrices_of
from megatron.plan.pieces import fake_group
from megatron.plan.rank import Rank


def muon_traffic(rank: Rank) -> Traffic:
    """The parts that go to the matrices' owners, and what came of them on its way back."""
    traffic, holders = Traffic(), rank.holders
    axis = "data" if rank.sizes["tensor"] == 1 else "tensor" if rank.replicas == 1 else (
        "world" if holders.size == rank.num_ranks else "holders")
    for one in _rounds(rank):
        for sent in (one.to_owners, one.to_holders):
            traffic.add(axis, EXCHANGE, _dtype().itemsize * (sum(sent) - sent[holders.rank]), holders.size)
    return traffic


def muon_flops(rank: Rank) -> int:
    """FLOPs of the matrices that this rank owns."""
    num_steps = rank.config.optimizer.muon_num_ns_steps
    return sum(num_flops(matrix.shape, num_steps) for one in _rounds(rank) for matrix in one.owned)


def muon_memory(rank: Rank) -> int:
    """The most bytes that its step takes, beside parameters, gradients and state."""
    config = rank.config.optimizer
    if not config.uses_muon:
        return 0
    return _taken(rank.held.trained, *_axes(rank), config)


def _rounds(rank: Rank) -> Sequence[Round]:
    config = rank.config.optimizer
    if not config.uses_muon:
        return ()
    return _shared_out(rank.held.trained, *_axes(rank), num_beside(_dtype()) if config.optimizer == "normuon" else 0)


def _axes(rank: Rank) -> tuple[Axis, Axis, Axis]:
    """Those of the mesh that Muon knows: tensor, shards and holders."""
    return Axis(rank.place["tensor"], rank.sizes["tensor"]), Axis(rank.shard, rank.shards), rank.holders


def _dtype() -> torch.dtype:
    """Of messages on GPUs."""
    return working_dtype(torch.empty((), device="meta"))


@cache
def _shared_out(held: Held, tensor: Axis, shards: Axis, holders: Axis, beside: int) -> Sequence[Round]:
    return rounds_of(shared_out(_parts(held, shards), Mesh(tensor=tensor, shards=shards, holders=holders)), holders,
                     beside)


@cache  # a search asks for the same ones thousands of times
def _taken(held: Held, tensor: Axis, shards: Axis, holders: Axis, config: OptimizerConfig) -> int:
    """Of a step on `meta`, in a process group that sends nothing."""
    most = 0

    def note() -> None:
        nonlocal most
        most = max(most, watch.current)

    with fake_group(holders.rank, holders.size), MemoryWatch() as watch:
        axis = build_axis({"holders": holders.size}, ["holders"], timedelta(minutes=1)) if holders.size > 1 else Axis()
        parts = _parts(held, shards)
        muon = Muon([{"params": parts, "weight_decay": config.weight_decay}], config,
                    Mesh(tensor=tensor, shards=shards, holders=axis))
        muon.grad_scale = muon.found_inf = torch.empty((), device="meta")
        for part in parts:
            part.grad, muon.state[part]["momentum_buffer"] = torch.empty_like(part), torch.empty_like(part)
        before, watch.at_growth = watch.current, note
        muon.step()
    return max(0, most - before)


def _parts(held: Held, shards: Axis) -> list[Tensor]:
    """What a rank has of the matrices, of which `shards` share out the rows."""
    parts = []
    for parameter in matrices_of(held):
        assert parameter.matrix is not None
        matrix, columns = parameter.matrix, parameter.shape[1]
        part = torch.empty(parameter.share(shards.size, shards.rank) // columns, columns, device="meta",
                           requires_grad=True)
        placement = placement_of(matrix)
        if shards.size > 1:
            placement = replace(placement, shards=shards, num_rows=len(matrix))
        part.placement, part.declaration = placement, declaration_of(matrix)  # type: ignore[attr-defined]
        parts.append(part)
    return parts
