"""What Muon sends and computes after the passes of a step: of the matrices as `megatron.parallel.matrices` shares them
out among the ranks that hold their parts.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from megatron.kernels.newton_schulz.orthogonal import num_flops, working_dtype
from megatron.parallel.matrices.sharing import Round, num_beside, rounds_of, shared_out
from megatron.parallel.mesh import Axis, Mesh
from megatron.parallel.parameters import declaration_of
from megatron.parallel.placement import placement_of
from megatron.parallel.traffic import EXCHANGE, Traffic
from megatron.plan.parameters import Held, matrices_of
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


def _rounds(rank: Rank) -> Sequence[Round]:
    config = rank.config.optimizer
    if not config.uses_muon:
        return ()
    return _shared_out(rank.held.trained, Axis(rank.place["tensor"], rank.sizes["tensor"]),
                       Axis(rank.shard, rank.shards), rank.holders,
                       num_beside(_dtype()) if config.optimizer == "normuon" else 0)


def _dtype() -> torch.dtype:
    """Of messages on GPUs."""
    return working_dtype(torch.empty((), device="meta"))


@cache
def _shared_out(held: Held, tensor: Axis, shards: Axis, holders: Axis, beside: int) -> Sequence[Round]:
    matrices = [_on_shard(parameter.matrix, shards) for parameter in matrices_of(held) if parameter.matrix is not None]
    return rounds_of(shared_out(matrices, Mesh(tensor=tensor, shards=shards, holders=holders)), holders, beside)


def _on_shard(matrix: Tensor, shards: Axis) -> Tensor:
    """The matrix as one of which `shards` share out the rows."""
    if shards.size == 1:
        return matrix
    shared = torch.empty_like(matrix)
    shared.placement = replace(placement_of(matrix), shards=shards, num_rows=len(matrix))  # type: ignore[attr-defined]
    shared.declaration = declaration_of(matrix)  # type: ignore[attr-defined]
    return shared
