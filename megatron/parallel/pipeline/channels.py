"""Point-to-point messages between pipeline ranks: activations and their gradients."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.parallel.collectives import Pending
from megatron.parallel.waits import Waits


@dataclass(frozen=True)
class Channel:
    """Messages of one kind, in order, from one rank to another."""

    group: dist.ProcessGroup
    sender: int  # ranks of the group
    receiver: int
    waits: Waits | None = None  # counts the time that this rank waits for messages

    def start_send(self, tensor: Tensor) -> Pending:
        """Begin to send `tensor`; leave it alone until the result's `wait`."""
        tensor = tensor.contiguous()
        work = dist.isend(tensor, group=self.group, group_dst=self.receiver) if tensor.numel() else None
        return Pending(tensor, work, self.waits)

    def start_receive(self, tensor: Tensor) -> Pending:
        """Begin to receive into `tensor`."""
        work = dist.irecv(tensor, group=self.group, group_src=self.sender) if tensor.numel() else None
        return Pending(tensor, work, self.waits)

    def open(self, rank: int, device: torch.device) -> None:
        """Send one number, so that the connection exists before the first message; sender and receiver call this."""
        number = torch.zeros(1, device=device)
        if rank == self.sender:
            self.start_send(number).wait()
        elif rank == self.receiver:
            self.start_receive(number).wait()

