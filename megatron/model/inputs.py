"""What the model takes of a micro-batch, and which share of it this rank computes.

Shapes: t tokens of the micro-batch or of this context rank, m targets among them.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron.kernels.attention import Boundaries
from megatron.parallel.tensor.stream import Stream


@dataclass(frozen=True)
class Inputs:
    """A micro-batch: token ids, positions that restart at 0 with each protein, targets by their place among the tokens.

    `boundaries` are always those of the whole micro-batch, whatever share of its tokens is here.
    """

    tokens_t: Tensor
    positions_t: Tensor
    boundaries: Boundaries
    target_positions_m: Tensor  # ascending
    target_ids_m: Tensor

    def shared(self, stream: Stream, device: torch.device) -> "Inputs":
        """On `device`, this context rank's equal share of the tokens and the targets that lie in it.

        Behind the tokens comes what is missing to the stream's multiple, as one more protein: no other protein sees it
        and it has no targets, so that nothing else changes; its ids are any. Cut on the host, whence the tensors come.
        """
        total = len(self.tokens_t)
        missing = -total % stream.token_multiple
        size = (total + missing) // stream.context.size
        start = stream.context.rank * size
        first, last = np.searchsorted(self.target_positions_m.numpy(), (start, start + size)).tolist()
        padding = size - len(self.tokens_t[start:start + size])
        tokens_t, positions_t, targets_m, ids_m, ends = (
            tensor.to(device, non_blocking=True) for tensor in (
                self.tokens_t[start:start + size], self.positions_t[start:start + size],
                self.target_positions_m[first:last], self.target_ids_m[first:last], self.boundaries.cu_seqlens))
        lengths = self.boundaries.lengths
        if missing:
            ends, lengths = torch.cat([ends, ends[-1:] + missing]), (*lengths, missing)
        if padding:
            tokens_t = torch.cat([tokens_t, tokens_t.new_zeros(padding)])
            before = max(start - total, 0)  # tokens of the same padding on the ranks before this one
            positions_t = torch.cat([positions_t, torch.arange(before, before + padding, device=device)])
        return Inputs(tokens_t, positions_t, Boundaries(ends, lengths), targets_m - start, ids_m)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole micro-batch, with those that even it out."""
        return sum(self.boundaries.lengths)
