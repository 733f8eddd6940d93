"""Messages, arithmetic and memory of Muon's part of a step.

`megatron.parallel.matrices` assigns each matrix to one of the ranks that hold its parts, its owner.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from megatron.config import OptimizerConfig
from megatron.kernels.newton_schulz.orthogonal import num_flops, working_dtype
from megatron.optim.muon import Muon
from megatron.parallel.matrices.sharing import Round, num_beside, rounds_of, shared_out
from megatron.parallel.mesh import Axis, Mesh
from megatron.parallel.parameters import declaration_of
from megatron.parallel.placement import placement_of
from megatron.parallel.traffic import EXCHANGE, Traffic
from megatron.plan.fake_group import fake_axes
from megatron.plan.memory_watch import MemoryWatch
from megatron.plan.parameters import Held, matrices_of
from megatron.plan.rank import Rank


def muon_traffic(rank: Rank) -> Traffic:
    """The messages that bring parts of matrices to their owners, and the results back."""
    traffic, holders = Traffic(), rank.holders
    axis = "data" if rank.sizes["tensor"] == 1 else "tensor" if rank.replicas == 1 else (
        "world" if holders.size == rank.num_ranks else "holders")
    for one in _rounds(rank):
        for sent in (one.to_owners, one.to_holders):
            traffic.add(axis, EXCHANGE, _dtype().itemsize * (sum(sent) - sent[holders.rank]), holders.size)
    return traffic


def muon_flops(rank: Rank) -> int:
    """FLOPs of orthogonalising the matrices that this rank owns."""
    num_steps = rank.config.optimizer.muon_num_ns_steps
    return sum(num_flops(matrix.shape, num_steps) for one in _rounds(rank) for matrix in one.owned)


def muon_memory(rank: Rank) -> int:
    """The peak bytes of temporaries in Muon's step, besides parameters, gradients and state; 0 without Muon."""
    config = rank.config.optimizer
    if not config.uses_muon:
        return 0
    return _taken(rank.held.trained, *_axes(rank), config)


def _rounds(rank: Rank) -> Sequence[Round]:
    """The rounds of exchanges in which the matrices are worked on; () without Muon."""
    config = rank.config.optimizer
    if not config.uses_muon:
        return ()
    return _shared_out(rank.held.trained, *_axes(rank), num_beside(_dtype()) if config.optimizer == "normuon" else 0)


def _axes(rank: Rank) -> tuple[Axis, Axis, Axis]:
    """The axes of the mesh that Muon uses: tensor, shards and holders."""
    return Axis(rank.place["tensor"], rank.sizes["tensor"]), Axis(rank.shard, rank.shards), rank.holders


def _dtype() -> torch.dtype:
    """The dtype of Muon's messages on GPUs."""
    return working_dtype(torch.empty((), device="meta"))


@cache
def _shared_out(held: Held, tensor: Axis, shards: Axis, holders: Axis, beside: int) -> Sequence[Round]:
    return rounds_of(shared_out(_parts(held, shards), Mesh(tensor=tensor, shards=shards, holders=holders)), holders,
                     beside)


@cache  # a search asks for the same ones thousands of times
def _taken(held: Held, tensor: Axis, shards: Axis, holders: Axis, config: OptimizerConfig) -> int:
    """The peak bytes of temporaries, measured in a step on `meta` in a process group that sends nothing."""
    most = 0

    def note() -> None:
        nonlocal most
        most = max(most, watch.current)

    with fake_axes(holders.rank, {"holders": holders.size}) as axes, MemoryWatch() as watch:
        parts = _parts(held, shards)
        muon = Muon([{"params": parts, "weight_decay": config.weight_decay}], config,
                    Mesh(tensor=tensor, shards=shards, holders=axes["holders"]))
        muon.grad_scale = muon.found_inf = torch.empty((), device="meta")
        for part in parts:
            part.grad, muon.state[part]["momentum_buffer"] = torch.empty_like(part), torch.empty_like(part)
        before, watch.at_growth = watch.current, note
        muon.step()
    return max(0, most - before)


def _parts(held: Held, shards: Axis) -> list[Tensor]:
    """This rank's parts of the matrices, on `meta`, if their rows are sharded over `shards`."""
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
