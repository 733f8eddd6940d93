"""Counts the bytes that a rank sends, by axis and operation, at PyTorch's calls of its collectives.

The numbers are those of ring algorithms, the minimum that every rank must send: for a tensor of N bytes on s ranks an
all-reduce sends 2 (s - 1) / s N, an all-gather or a reduce-scatter (s - 1) / s N (N: of the whole tensor), a
point-to-point message N (counted by its sender), and an all-to-all what goes to other ranks.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.parallel.mesh import Mesh

# (axis, operation), for example ("tensor", "all-reduce").
Key = tuple[str, str]

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, SEND = "all-reduce", "all-gather", "reduce-scatter", "send"
EXCHANGE = "exchange"


class Traffic:
    """Calls and bytes that one rank sends, by axis and operation."""

    def __init__(self, calls: Mapping[Key, int] | None = None, sent: Mapping[Key, int] | None = None) -> None:
        self.calls, self.sent = Counter(calls), Counter(sent)

    def add(self, axis: str, operation: str, num_bytes: int, num_ranks: int, times: int = 1) -> None:
        """Count `times` calls on `num_ranks` ranks, with `num_bytes` of the whole tensor; on one rank nothing is sent.
        """
        if num_ranks > 1 and times:
            rounds = {ALL_REDUCE: 2 * num_ranks - 2, SEND: num_ranks, EXCHANGE: num_ranks}.get(operation, num_ranks - 1)
            self.calls[axis, operation] += times
            self.sent[axis, operation] += times * (rounds * num_bytes // num_ranks)

    def include(self, other: "Traffic", times: int = 1) -> None:
        """Add `other`, `times` times."""
        for key, calls in other.calls.items():
            self.calls[key] += times * calls
            self.sent[key] += times * other.sent[key]

    def continued(self, later: "Traffic", factor: float) -> "Traffic":
        """This, plus `factor` times the difference between `later` and this: an extrapolation."""
        def line(ours: Counter[Key], theirs: Counter[Key]) -> dict[Key, int]:
            return {key: round(ours[key] + factor * (theirs[key] - ours[key])) for key in theirs}
        return Traffic(line(self.calls, later.calls), line(self.sent, later.sent))


class TrafficCounter(TorchDispatchMode):
    """A context in which `traffic` counts every collective of this process.

    Axes that share a process group are counted together, under all their names, such as "data+tensor".
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.traffic = Traffic()
        self._axes = _axes_by_group(mesh)

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, and count it if it is a collective."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # the operations on its local tensor are counted
        results = func(*args, **(kwargs or {}))
        self.count(func, args)
        return results

    def count(self, func: Any, args: Sequence[Any], *_: Any) -> None:
        """Count the operation `func` with these arguments if it is a collective."""
        if func.namespace == "c10d" and func in _COUNTED:
            operation, whole_of, group_index = _COUNTED[func]
            group = dist.ProcessGroup.unbox(args[group_index])
            num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in whole_of(args))
            self.traffic.add(self._axes.get(group.group_name, "other"), operation, num_bytes, group.size())


def _axes_by_group(mesh: Mesh) -> dict[str, str]:
    groups = [("pipeline", axis.group) for axis in (mesh.pipeline, mesh.ends)]
    groups += [("pipeline", channel) for channel in mesh.channels]
    groups += [("data", axis.group) for axis in (mesh.data, mesh.replicas, mesh.shards, mesh.copies)]
    groups += [("context", mesh.context.group), ("tensor", mesh.tensor.group)]
    names: dict[str, list[str]] = {}
    for name, group in groups:
        if group is not None and name not in names.setdefault(group.group_name, []):
            names[group.group_name].append(name)
    for name, axis in (("world", mesh.world), ("holders", mesh.holders)):
        if axis.group is not None:
            names.setdefault(axis.group.group_name, [name])
    return {group: "+".join(sharing) for group, sharing in names.items()}


def _for_others(args: Sequence[Any]) -> Sequence[torch.Tensor]:
    """The tensors that an all-to-all sends to other ranks."""
    own = dist.ProcessGroup.unbox(args[2]).rank()
    return [piece for rank, piece in enumerate(args[1].split(args[4])) if rank != own]


_Tensors = Callable[[Sequence[Any]], Sequence[torch.Tensor]]
_C10D = torch.ops.c10d
# Of each operator: its name here, the tensors that make up the whole, and the position of its group in the arguments.
_COUNTED: dict[Any, tuple[str, _Tensors, int]] = {
    _C10D.allreduce_.default: (ALL_REDUCE, lambda args: args[0], 1),
    _C10D._allgather_base_.default: (ALL_GATHER, lambda args: args[:1], 2),
    _C10D._reduce_scatter_base_.default: (REDUCE_SCATTER, lambda args: args[1:2], 2),
    _C10D.alltoall_base_.default: (EXCHANGE, _for_others, 2),
    _C10D.send.default: (SEND, lambda args: args[0], 1),
}
