"""The residual stream on the tensor axis, and the transitions between it and layers that are split over that axis.

Without sequence parallelism every tensor rank holds all tokens and repeats LayerNorm, dropout and residual additions.
With it rank r holds the r-th slice of the tokens, and the all-reduce after a split layer becomes a reduce-scatter after
it and an all-gather before the next: the same bytes, less memory (Korthikanti et al., 2022, arXiv 2205.05198).
Shapes: t tokens of the micro-batch, u tokens of the stream on this rank (t, or t / ranks), h hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron.kernels.dropout import Dropout
from megatron.kernels.pointwise.product import Product
from megatron.kernels.pointwise.residual_norm import Scaling, add_branch, after_dropout
from megatron.parallel import collectives
from megatron.parallel.collectives import Pending
from megatron.parallel.mesh import ONE_RANK_AXIS, Axis
from megatron.parallel.parameters import Declaration, replicated_parameter


@dataclass(frozen=True)
class Stream:
    """How the residual stream is laid out on the tensor ranks.

    "All tokens" t are those of this context rank: a micro-batch's tokens are split over the context axis first.
    """

    axis: Axis = ONE_RANK_AXIS  # the tensor axis
    is_split: bool = False  # sequence parallelism: each rank holds a slice of the tokens; else every rank holds all
    context: Axis = ONE_RANK_AXIS

    @property
    def token_multiple(self) -> int:
        """What the number of tokens of a micro-batch has to be divisible by."""
        return self.context.size * (self.axis.size if self.is_split else 1)

    def num_tokens_here(self, num_tokens: int) -> int:
        """The number of tokens in this rank's stream, of a micro-batch of `num_tokens` padded to `token_multiple`."""
        return -(-num_tokens // self.token_multiple)

    def start_enter(self, hidden_uh: Tensor) -> Pending:
        """Begin to gather all tokens [t, h] for a split layer. Not differentiable: `start_leave` is its gradient."""
        return collectives.start_all_gather(hidden_uh, self.axis) if self.is_split else Pending(hidden_uh, None)

    def start_leave(self, partial_th: Tensor) -> Pending:
        """Begin to sum a split layer's `partial_th` over the ranks; gives this rank's tokens [u, h]. Not
        differentiable."""
        start = collectives.start_reduce_scatter if self.is_split else collectives.start_all_reduce
        return start(partial_th, self.axis)

    def leave(self, partial_th: Tensor) -> Tensor:
        """Forward: this rank's tokens [u, h] of the sum over the ranks (reduce-scatter or all-reduce). Backward: the
        gradients of all tokens (all-gather or nothing)."""
        leave = collectives.sum_to_slices if self.is_split else collectives.sum_outputs
        return leave(partial_th, self.axis)

    def tokens(self, values_t: Tensor) -> Tensor:
        """This rank's tokens [u] of values that it has for all tokens. Not differentiable."""
        return collectives.slice_of(values_t, self.axis) if self.is_split else values_t

    def pick(self, hidden_uh: Tensor, positions_m: Tensor) -> Tensor:
        """The rows [m, h] at `positions_m` among all t tokens, on every rank.

        Forward: an all-reduce, to which each rank contributes the rows that it has. Backward: each rank keeps the
        gradients of its own tokens.
        """
        if self.is_split:
            return collectives.sum_outputs(rows_here(hidden_uh, positions_m, self.axis), self.axis)
        return hidden_uh.index_select(0, positions_m)

    def parameter(self, shape: Sequence[int], declaration: Declaration) -> nn.Parameter:
        """A parameter that acts on the stream: whole on every rank; its gradient is that of this rank's tokens."""
        return replicated_parameter(shape, self.axis, declaration, has_partial_gradient=self.is_split)

    def dropout(self, hidden_uh: Tensor, dropout: Dropout | None) -> Tensor:
        """[u, h] after dropout; a token's mask does not depend on the rank that holds it."""
        return after_dropout(hidden_uh, self._of_tokens_here(dropout, len(hidden_uh)))

    def dropout_of_features(self, x_ti: Tensor, dropout: Dropout | None) -> Tensor:
        """[t, i], all tokens and this rank's features, after dropout; the mask does not depend on the split."""
        if dropout is None:
            return x_ti
        return after_dropout(x_ti, dropout.from_row(self.context.rank * len(x_ti)), self.axis.rank * x_ti.shape[1])

    def add_branch(self, residual_uh: Tensor, branch: Product, dropout: Dropout | None, scaling: Scaling | None,
                   dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The stream plus a branch after dropout, [u, h]; and that sum normalised for the next branch, in `dtype`."""
        return add_branch(residual_uh, branch, self._of_tokens_here(dropout, len(residual_uh)), scaling, dtype)

    def _of_tokens_here(self, dropout: Dropout | None, num_here: int) -> Dropout | None:
        """`dropout` for this rank's tokens, which are counted from the micro-batch's first token."""
        if dropout is None:
            return None
        slices, slice_here = (self.axis.size, self.axis.rank) if self.is_split else (1, 0)
        return dropout.from_row((self.context.rank * slices + slice_here) * num_here)


ONE_RANK_STREAM = Stream()


def rows_here(table_rh: Tensor, ids_m: Tensor, axis: Axis) -> Tensor:
    """The rows [m, h] of a table split by rows over `axis`; 0 where another rank has the row: a partial tensor."""
    if axis.size == 1:
        return F.embedding(ids_m, table_rh)
    ids_m = ids_m - axis.rank * len(table_rh)
    is_elsewhere_m = (ids_m < 0) | (ids_m >= len(table_rh))
    rows_mh = F.embedding(ids_m.masked_fill(is_elsewhere_m, 0), table_rh)
    return rows_mh.masked_fill(is_elsewhere_m[:, None], 0)
