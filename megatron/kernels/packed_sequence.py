"""Packed proteins, concatenated without padding between them, and their targets: the input of model and attention.

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
    """Concatenated proteins, each with its end tokens, followed by filler up to t tokens.

    Protein i is `cu_seqlens[i]:cu_seqlens[i + 1]`. If there are fewer than g proteins, the others are empty: they begin
    and end where the filler begins. The last `num_filler` entries cut the filler into segments of at most `max_length`,
    so that kernels may treat them as proteins; no protein attends to filler, and it has no targets. t, g, `max_length`
    and `num_filler` are the same for every micro-batch of a run, so shapes do not depend on the data. With context
    parallelism `tokens_t` and `positions_t` are this rank's equal share, but the boundaries are those of all tokens.
    """

    tokens_t: Tensor  # int64
    positions_t: Tensor  # int64, in the protein: 0 at its start, [CLS] or <cls>
    cu_seqlens: Tensor  # int32 [g + num_filler + 1], from 0 to the number of tokens on all context ranks
    max_length: int
    num_filler: int
    seed: Tensor | None = None  # int64 [], of the micro-batch's dropout; None if not needed
    masks: dict[Any, Any] | None = None  # FlexAttention's block masks, by window (see `attention.flex`)

    def map(self, function: Callable[[Tensor], Tensor]) -> "PackedSequence":
        """A copy with `function` applied to each tensor."""
        return replace(self, tokens_t=function(self.tokens_t), positions_t=function(self.positions_t),
                       cu_seqlens=function(self.cu_seqlens), seed=None if self.seed is None else function(self.seed))

    def tensors(self) -> tuple[Tensor, ...]:
        """Tokens, positions, boundaries, and the seed where there is one."""
        return self.tokens_t, self.positions_t, self.cu_seqlens, *([] if self.seed is None else [self.seed])


@dataclass(frozen=True)
class Targets:
    """The tokens to predict: their indices among this rank's tokens, and their original ids.

    m is the same in every micro-batch; unused entries have index 0 and id NO_TARGET.
    """

    positions_m: Tensor  # int64, ascending, apart from unused entries
    ids_m: Tensor  # int64

    def map(self, function: Callable[[Tensor], Tensor]) -> "Targets":
        """A copy with `function` applied to each tensor."""
        return Targets(*map(function, self.tensors()))

    def tensors(self) -> tuple[Tensor, ...]:
        """Positions and ids."""
        return self.positions_m, self.ids_m


def protein_lengths(cu_seqlens: Tensor, num_filler: int) -> list[int]:
    """The number of tokens of each non-empty protein; waits for the device if the boundaries are on one."""
    return [length for length in torch.diff(cu_seqlens)[:len(cu_seqlens) - 1 - num_filler].tolist() if length]


def proteins_of_tokens(cu_seqlens: Tensor, start: int, stop: int) -> Tensor:
    """The index of the protein, or segment of filler, that each of the tokens `start:stop` belongs to, int64.

    Tokens before the first get -1; tokens after the last get the number of proteins and segments.
    """
    places = torch.arange(start, stop, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.bucketize(places, cu_seqlens, right=True) - 1
