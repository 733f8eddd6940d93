"""Triton kernels for `megatron.kernels.pointwise.residual_norm`: programs take whole rows, which stay in registers.

sum = residual + dropout(branch + shift); normed = LayerNorm or RMSNorm of the sum. All arithmetic is in fp32; results
are rounded to the output's dtype. The backward pass draws the dropout mask again instead of storing it.
Shapes: u tokens, the rows; h hidden, the columns; k parameters with gradients; p programs with partial sums.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.kernels.device import MOST_WARPS
from megatron.kernels.dropout_triton import drawn


def join(residual_uh: Tensor, branch_uh: Tensor | None, shift_h: Tensor | None, seed: Tensor | None,
         drawn_of: Sequence[int], weight_h: Tensor | None, bias_h: Tensor | None, epsilon: float, sum_uh: Tensor,
         normed_uh: Tensor, statistics_u2: Tensor) -> None:
    """Fill `sum_uh`, `normed_uh` and `statistics_u2`: each row's mean (LayerNorm only) and inverse standard deviation.

    Without a branch, for a norm alone, `sum_uh` is not touched; without a weight, `normed_uh` and the statistics are
    not. `drawn_of`: what `_dropout` takes.
    """
    num_rows, width = residual_uh.shape
    rows, block, num_warps = _tile(width)
    forward_kernel[triton.cdiv(num_rows, rows),](
        residual_uh, branch_uh, shift_h, seed, weight_h, bias_h, sum_uh, normed_uh, statistics_u2, num_rows,
        *_dropout(drawn_of), epsilon, width, rows, block, branch_uh is not None, shift_h is not None,
        seed is not None, weight_h is not None, bias_h is not None, num_warps=num_warps)


def join_backward(grad_sum_uh: Tensor | None, grad_normed_uh: Tensor | None, x_uh: Tensor,
                  statistics_u2: Tensor | None, weight_h: Tensor | None, seed: Tensor | None, drawn_of: Sequence[int],
                  has_mean: bool, has_shift: bool, grad_residual_uh: Tensor | None,
                  grad_branch_uh: Tensor | None) -> Tensor:
    """Fill `grad_residual_uh` and `grad_branch_uh`, unless None; return the parameters' gradients, [k, h] in fp32.

    The rows of the result are the gradients of weight, bias and shift, in this order, without those that are absent.
    """
    num_rows, width = x_uh.shape
    rows, block, num_warps = _tile(width)
    num_warps = min(16, 2 * num_warps)  # the sums need registers too: 8 elements per thread
    programs = min(triton.cdiv(num_rows, rows), MOST_WARPS // num_warps)
    has_norm = weight_h is not None
    num_sums = has_norm + has_mean + has_shift
    partial_pkh = torch.empty(programs, num_sums, width, dtype=torch.float32, device=x_uh.device)
    backward_kernel[programs,](
        grad_sum_uh, grad_normed_uh, x_uh, statistics_u2, weight_h, seed, grad_residual_uh, grad_branch_uh, partial_pkh,
        num_rows, *_dropout(drawn_of), width, rows, block, grad_sum_uh is not None, has_norm, has_mean,
        has_shift, seed is not None, grad_residual_uh is not None, grad_branch_uh is not None, num_warps=num_warps)
    return partial_pkh.sum(0) if num_sums else partial_pkh.new_empty(0, width)


def _tile(width: int) -> tuple[int, int, int]:
    """The rows, columns and warps of a program's tile: 16 elements per thread if a row has that many."""
    block = max(8, triton.next_power_of_2(width))
    rows = max(1, 2048 // block)
    return rows, block, min(16, max(4, rows * block // 512))


def _dropout(drawn_of: Sequence[int]) -> tuple[int, float, int, int]:
    """How many of 65,536 numbers are kept, the factor of kept elements, the use, and the first row's number.

    `drawn_of` holds the first, third and fourth of these; it is empty without dropout.
    """
    kept, use, first_row = drawn_of or (2**16, 0, 0)
    return kept, 2**16 / max(kept, 1), use, first_row


@triton.jit
def forward_kernel(residual, branch, shift, seed, weight, bias, sum, normed, statistics, num_rows, kept,
                   growth, use, first_row, epsilon, width, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                   HAS_BRANCH: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_DROPOUT: tl.constexpr,
                   HAS_NORM: tl.constexpr, HAS_MEAN: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    is_inside = (rows[:, None] < num_rows) & (columns[None, :] < width)
    places = rows[:, None].to(tl.int64) * width + columns[None, :]
    x = tl.load(residual + places, mask=is_inside, other=0).to(tl.float32)
    if HAS_BRANCH:
        added = tl.load(branch + places, mask=is_inside, other=0).to(tl.float32)
        if HAS_SHIFT:
            added += tl.load(shift + columns, mask=columns < width, other=0).to(tl.float32)[None, :]
        if HAS_DROPOUT:
            added = tl.where(drawn(seed, first_row + rows, 0, 0, use, BLOCK) < kept, added * growth, 0)
        rounded = (x + added).to(sum.dtype.element_ty)
        tl.store(sum + places, rounded, mask=is_inside)
        x = rounded.to(tl.float32)  # as the backward pass reads it, so that both normalise the same
    if HAS_NORM:
        centred = x
        if HAS_MEAN:
            mean = tl.sum(x, 1) / width
            tl.store(statistics + 2 * rows, mean, mask=rows < num_rows)
            centred = tl.where(is_inside, x - mean[:, None], 0)
        inverse = 1 / tl.sqrt(tl.sum(centred * centred, 1) / width + epsilon)
        tl.store(statistics + 2 * rows + 1, inverse, mask=rows < num_rows)
        factor = tl.load(weight + columns, mask=columns < width, other=0).to(tl.float32)
        y = centred * inverse[:, None] * factor[None, :]
        if HAS_MEAN:
            y += tl.load(bias + columns, mask=columns < width, other=0).to(tl.float32)[None, :]
        tl.store(normed + places, y.to(normed.dtype.element_ty), mask=is_inside)


@triton.jit
def backward_kernel(grad_sum, grad_normed, x_pointer, statistics, weight, seed, grad_residual, grad_branch, partial,
                    num_rows, kept, growth, use, first_row, width, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                    HAS_GRAD_SUM: tl.constexpr, HAS_NORM: tl.constexpr, HAS_MEAN: tl.constexpr,
                    HAS_SHIFT: tl.constexpr, HAS_DROPOUT: tl.constexpr, GIVES_RESIDUAL: tl.constexpr,
                    GIVES_BRANCH: tl.constexpr):
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    if HAS_NORM:
        factor = tl.load(weight + columns, mask=columns < width, other=0).to(tl.float32)
        weight_sum = tl.zeros([ROWS, BLOCK], tl.float32)
        if HAS_MEAN:
            bias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    if HAS_SHIFT:
        shift_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        is_inside = (rows[:, None] < num_rows) & (columns[None, :] < width)
        places = rows[:, None].to(tl.int64) * width + columns[None, :]
        gradient = tl.zeros([ROWS, BLOCK], tl.float32)
        if HAS_NORM:
            outer = tl.load(grad_normed + places, mask=is_inside, other=0).to(tl.float32)
            x = tl.load(x_pointer + places, mask=is_inside, other=0).to(tl.float32)
            inverse = tl.load(statistics + 2 * rows + 1, mask=rows < num_rows, other=0)
            if HAS_MEAN:
                mean = tl.load(statistics + 2 * rows, mask=rows < num_rows, other=0)
                x = tl.where(is_inside, x - mean[:, None], 0)
                bias_sum += outer
            x *= inverse[:, None]
            weight_sum += outer * x
            outer *= factor[None, :]
            gradient = outer - x * (tl.sum(outer * x, 1) / width)[:, None]
            if HAS_MEAN:
                gradient -= (tl.sum(outer, 1) / width)[:, None]
            gradient *= inverse[:, None]
        if HAS_GRAD_SUM:
            gradient += tl.load(grad_sum + places, mask=is_inside, other=0).to(tl.float32)
        if GIVES_RESIDUAL:
            tl.store(grad_residual + places, gradient.to(grad_residual.dtype.element_ty), mask=is_inside)
        if HAS_DROPOUT:
            gradient = tl.where(drawn(seed, first_row + rows, 0, 0, use, BLOCK) < kept, gradient * growth, 0)
        if HAS_SHIFT:
            shift_sum += gradient
        if GIVES_BRANCH:
            tl.store(grad_branch + places, gradient.to(grad_branch.dtype.element_ty), mask=is_inside)
    partial += program.to(tl.int64) * (HAS_NORM + HAS_MEAN + HAS_SHIFT) * width
    if HAS_NORM:
        tl.store(partial + columns, tl.sum(weight_sum, 0), mask=columns < width)
    if HAS_MEAN:
        tl.store(partial + width + columns, tl.sum(bias_sum, 0), mask=columns < width)
    if HAS_SHIFT:
        tl.store(partial + (HAS_NORM + HAS_MEAN) * width + columns, tl.sum(shift_sum, 0), mask=columns < width)

