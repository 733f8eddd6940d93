"""Whole proteins on one line of tokens: what passes from the loader through the model to the attention kernel.

Shapes: t tokens, g proteins, m targets.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

NO_TARGET = -100  # what `torch.nn.functional.cross_entropy` ignores


@dataclass(frozen=True)
class PackedSequence:
    """Proteins one behind the other, each with its ends, and behind the last of them filler up to t tokens.

    Protein i is `cu_seqlens[i]:cu_seqlens[i + 1]`. Where there are fewer than g, the others are empty: they begin and
    end where the filler begins. The last `num_filler` entries cut the filler into segments no longer than `max_length`,
    so that it can pass for proteins; nothing sees it, and it has no targets. t, g and the two numbers are the same for
    every micro-batch of a run, so that nothing depends on what lies in it. On several context ranks `tokens_t` and
    `positions_t` are this rank's equal share, and the boundaries those of all tokens.
    """

    tokens_t: Tensor  # int64
    positions_t: Tensor  # int64, 0 at the start of each protein, [CLS] or <cls>
    cu_seqlens: Tensor  # int32 [g + num_filler + 1], from 0 to the number of tokens on all context ranks
    max_length: int
    num_filler: int
    seed: Tensor | None = None  # int64 [], of the micro-batch's dropout; None where it is not needed
    masks: dict[Any, Any] | None = None  # what FlexAttention knows of it, by window (see `attention.flex`)

    def map(self, function: Callable[[Tensor], Tensor]) -> "PackedSequence":
        """The same with `function` of each tensor."""
        return replace(self, tokens_t=function(self.tokens_t), positions_t=function(self.positions_t),
                       cu_seqlens=function(self.cu_seqlens), seed=None if self.seed is None else function(self.seed))

    def tensors(self) -> tuple[Tensor, ...]:
        """Tokens, positions, boundaries, and the seed where there is one."""
        return self.tokens_t, self.positions_t, self.cu_seqlens, *([] if self.seed is None else [self.seed])


@dataclass(frozen=True)
class Targets:
    """The tokens to predict: their places among the tokens here, and the ids that stood there.

    As many in every micro-batch; where there are fewer, the rest have the place 0 and the id NO_TARGET.
    """

    positions_m: Tensor  # int64, ascending where they are targets
    ids_m: Tensor  # int64

    def map(self, function: Callable[[Tensor], Tensor]) -> "Targets":
        """The same with `function` of each tensor."""
        return Targets(*map(function, self.tensors()))

    def tensors(self) -> tuple[Tensor, ...]:
        """Positions and ids."""
        return self.positions_m, self.ids_m


def protein_lengths(cu_seqlens: Tensor, num_filler: int) -> list[int]:
    """The tokens of each protein that is not empty; waits for the device where the boundaries are not on the host."""
    return [length for length in torch.diff(cu_seqlens)[:len(cu_seqlens) - 1 - num_filler].tolist() if length]


def proteins_of_tokens(cu_seqlens: Tensor, start: int, stop: int) -> Tensor:
    """The number of the protein, or of the filler's segment, in which each of the tokens `start:stop` lies, int64.

    Tokens before the first and behind the last one have numbers of their own, -1 and the number of all.
    """
    places = torch.arange(start, stop, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.bucketize(places, cu_seqlens, right=True) - 1
