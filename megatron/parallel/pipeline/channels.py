"""What one rank sends to another: activations and their gradients between pipeline ranks."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.parallel.collectives import Pending
from megatron.parallel.waits import Waits


@dataclass(frozen=True)
class Channel:
    """Messages of one kind from `sender` to `receiver`, ranks of `group`, in order; `waits` counts waiting for them."""

    group: dist.ProcessGroup
    sender: int
    receiver: int
    waits: Waits | None = None

    def start_send(self, tensor: Tensor) -> Pending:
        """Begin to send `tensor`, which is not to be touched until it is waited for."""
        tensor = tensor.contiguous()
        work = dist.isend(tensor, group=self.group, group_dst=self.receiver) if tensor.numel() else None
        return Pending(tensor, work, self.waits)

    def start_receive(self, tensor: Tensor) -> Pending:
        """Begin to receive into `tensor`."""
        work = dist.irecv(tensor, group=self.group, group_src=self.sender) if tensor.numel() else None
        return Pending(tensor, work, self.waits)

    def open(self, rank: int, device: torch.device) -> None:
        """Exchange one number, so that no later message waits for a connection to be made."""
        number = torch.zeros(1, device=device)
        if rank == self.sender:
            self.start_send(number).wait()
        elif rank == self.receiver:
            self.start_receive(number).wait()

