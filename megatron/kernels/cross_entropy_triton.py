"""Triton kernels for `megatron.kernels.cross_entropy`: each program handles whole rows of logits, a block at a time.

A vocabulary of letters fits into one block, so each row is read once and stays in registers. All arithmetic is in fp32.
Shapes: c rows of logits, v local vocabulary, of which id `first` is column 0.
"""

import triton
import triton.language as tl
from torch import Tensor

from megatron.kernels.packed_sequence import NO_TARGET

_WIDEST = 2048  # most columns in a block
_NO_TARGET = tl.constexpr(NO_TARGET)


def launch_forward(logits_cv: Tensor, ids_c: Tensor, first: int, softcap: float | None, statistics_4c: Tensor) -> None:
    """Fill `statistics_4c`, fp32, with four values for each row.

    They are the logsumexp of the row; the target's log-probability, 0 for NO_TARGET and -inf if the target's column is
    not in this part of the vocabulary; 1 if the target has the largest logit here, else 0; and the largest logit.
    """
    num_rows, width = logits_cv.shape
    rows, block = _tile(width)
    if num_rows:
        forward_kernel[triton.cdiv(num_rows, rows),](logits_cv, ids_c, statistics_4c, num_rows, width, first,
                                                     softcap or 0.0, softcap is not None, rows, block)


def launch_backward(logits_cv: Tensor, ids_c: Tensor, logsumexp_c: Tensor, gradient: Tensor, first: int,
                    softcap: float | None, grad_cv: Tensor) -> None:
    """Fill `grad_cv`, the gradient of the logits; `gradient` is that of the summed loss, a scalar on the device."""
    num_rows, width = logits_cv.shape
    rows, block = _tile(width)
    if num_rows and width:
        backward_kernel[triton.cdiv(num_rows, rows),](
            logits_cv, ids_c, logsumexp_c, gradient, grad_cv, num_rows, width, first, softcap or 0.0,
            softcap is not None, rows, block)


def _tile(width: int) -> tuple[int, int]:
    """The rows and columns of a program's tile: 16 elements per thread."""
    block = min(_WIDEST, max(16, triton.next_power_of_2(width)))
    return _WIDEST // block, block


@triton.jit
def forward_kernel(logits, ids, statistics, num_rows, width, first, softcap, HAS_CAP: tl.constexpr, ROWS: tl.constexpr,
                   BLOCK: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    ids = tl.load(ids + rows, mask=is_row, other=_NO_TARGET)
    places = ids - first
    # Finite rather than -inf, so that a row without any logits does not give NaN.
    largest = tl.full([ROWS], -1e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    target = tl.full([ROWS], float("-inf"), tl.float32)
    winner = tl.full([ROWS], -1, tl.int32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        is_column = (columns < width)[None, :]
        x = tl.load(logits + rows[:, None].to(tl.int64) * width + columns[None, :], mask=is_row[:, None] & is_column,
                    other=0).to(tl.float32)
        if HAS_CAP:
            x = softcap * tanh(x / softcap)
        x = tl.where(is_column, x, float("-inf"))
        highest, place = tl.max(x, 1, return_indices=True)
        winner = tl.where(highest > largest, start + place, winner)
        new_largest = tl.maximum(largest, highest)
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(x - new_largest[:, None]), 1)
        largest = new_largest
        target = tl.maximum(target, tl.max(tl.where(columns[None, :] == places[:, None], x, float("-inf")), 1))
    is_target, statistics = ids != _NO_TARGET, statistics + rows
    logarithm = tl.log(total)
    share = tl.where(target > float("-inf"), target - largest - logarithm, target)  # no NaN without columns
    tl.store(statistics, largest + logarithm, mask=is_row)
    tl.store(statistics + num_rows, tl.where(is_target, share, 0), mask=is_row)
    tl.store(statistics + 2 * num_rows, (is_target & (winner == places)).to(tl.float32), mask=is_row)
    tl.store(statistics + 3 * num_rows, largest, mask=is_row)


@triton.jit
def backward_kernel(logits, ids, logsumexp, gradient, grad, num_rows, width, first, softcap, HAS_CAP: tl.constexpr,
                    ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    ids = tl.load(ids + rows, mask=is_row, other=_NO_TARGET)
    places = ids - first
    factor = tl.where(ids == _NO_TARGET, 0, tl.load(gradient))[:, None]
    shift = tl.load(logsumexp + rows, mask=is_row, other=0)[:, None]
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        is_inside = is_row[:, None] & (columns < width)[None, :]
        offsets = rows[:, None].to(tl.int64) * width + columns[None, :]
        x = tl.load(logits + offsets, mask=is_inside, other=0).to(tl.float32)
        slope = factor
        if HAS_CAP:
            x = tanh(x / softcap)
            slope = factor * (1 - x * x)
            x *= softcap
        result = (tl.exp(x - shift) - (columns[None, :] == places[:, None]).to(tl.float32)) * slope
        tl.store(grad + offsets, result.to(grad.dtype.element_ty), mask=is_inside)


@triton.jit
def tanh(x):
    """tanh(x), from the logistic function; near 0, where that would cancel, from the first terms of the series."""
    square = x * x
    near = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(square < 0.0625, near, 2 * tl.sigmoid(2 * x) - 1)
