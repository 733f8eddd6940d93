"""What one rank sends to another: activations and their gradients between pipeline ranks, parameters to the saver."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.parallel.collectives import Pending
from megatron.parallel.mesh import Axis


@dataclass(frozen=True)
class Channel:
    """Messages of one kind from `sender` to `receiver`, ranks of `group`, in order."""

    group: dist.ProcessGroup
    sender: int
    receiver: int

    def start_send(self, tensor: Tensor) -> Pending:
        """Begin to send `tensor`, which is not to be touched until it is waited for."""
        tensor = tensor.contiguous()
        work = dist.isend(tensor, group=self.group, group_dst=self.receiver) if tensor.numel() else None
        return Pending(tensor, work)

    def start_receive(self, tensor: Tensor) -> Pending:
        """Begin to receive into `tensor`."""
        work = dist.irecv(tensor, group=self.group, group_src=self.sender) if tensor.numel() else None
        return Pending(tensor, work)

    def open(self, rank: int, device: torch.device) -> None:
        """Exchange one number, so that no later message waits for a connection to be made."""
        number = torch.zeros(1, device=device)
        if rank == self.sender:
            self.start_send(number).wait()
        elif rank == self.receiver:
            self.start_receive(number).wait()


def collect(tensors: Mapping[str, Tensor], axis: Axis) -> dict[str, Tensor]:
    """On the axis' first rank the named tensors of all its ranks, on the CPU; elsewhere {}. All of them call this."""
    if axis.size == 1:
        return dict(tensors)
    device = torch.device("cuda") if dist.get_backend(axis.group) == "nccl" else torch.device("cpu")
    described = [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]
    everyones: list[list] | None = [[]] * axis.size if axis.rank == 0 else None
    dist.gather_object(described, everyones, group=axis.group, group_dst=0)
    if everyones is None:
        for tensor in tensors.values():
            dist.send(tensor.to(device).contiguous(), group=axis.group, group_dst=0)
        return {}
    collected = dict(tensors)
    for sender, names in enumerate(everyones[1:], 1):
        for name, shape, dtype in names:
            tensor = torch.empty(shape, dtype=dtype, device=device)
            dist.recv(tensor, group=axis.group, group_src=sender)
            collected[name] = tensor.cpu()
    return collected
