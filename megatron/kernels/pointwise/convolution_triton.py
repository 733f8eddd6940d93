"""Triton kernels for `megatron.kernels.pointwise.convolution`: each program handles tiles of rows and columns, in fp32.

A row is read once for each tap; all reads but the first come from the caches. The weight's gradient is a sum over all
rows. In the backward pass each program therefore strides over the tiles of its columns and keeps partial sums, which
PyTorch then adds up. Shapes: t tokens, the rows; f features, the columns; k taps; p programs with partial sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.kernels.device import MOST_PROGRAMS

_ROWS, _COLUMNS = 16, 128  # of a forward tile: 16 elements per thread; backward 8, and a sum for each tap


def convolve(x_tf: Tensor, positions_t: Tensor, weight_fk: Tensor) -> Tensor:
    """x plus its depthwise convolution within each protein, [t, f], in the dtype of `x_tf`.

    `positions_t`: each token's position in its protein, from 0.
    """
    x_tf, weight_fk = x_tf.contiguous(), weight_fk.contiguous()
    out_tf = torch.empty_like(x_tf)
    num_rows, width = x_tf.shape
    forward_kernel[triton.cdiv(num_rows, _ROWS), triton.cdiv(width, _COLUMNS)](
        x_tf, positions_t.contiguous(), weight_fk, out_tf, num_rows, width, weight_fk.shape[1], _ROWS, _COLUMNS)
    return out_tf


def convolve_backward(grad_tf: Tensor, x_tf: Tensor, positions_t: Tensor, weight_fk: Tensor,
                      has_bias: bool) -> tuple[Tensor, Tensor]:
    """The gradient of `x_tf`, and in one fp32 vector that of the weight [f·k], followed by that of the bias [f] if any.

    The bias is one that `x_tf` already contains: its gradient is the sum of that of `x_tf` over the tokens.
    """
    x_tf, weight_fk = x_tf.contiguous(), weight_fk.contiguous()
    grad_x_tf = torch.empty_like(x_tf)
    (num_rows, width), rows, taps = x_tf.shape, _ROWS // 2, weight_fk.shape[1]
    blocks = triton.cdiv(width, _COLUMNS)
    strips = min(triton.cdiv(num_rows, rows), max(1, MOST_PROGRAMS // blocks))
    partial_px = torch.empty(strips, (taps + has_bias) * width, dtype=torch.float32, device=x_tf.device)
    backward_kernel[strips, blocks](
        grad_tf.contiguous(), x_tf, positions_t.contiguous(), weight_fk, grad_x_tf, partial_px, num_rows, width, taps,
        has_bias, rows, _COLUMNS)
    return grad_x_tf, partial_px.sum(0)


@triton.jit
def forward_kernel(x, positions, weight, out, num_rows, width, TAPS: tl.constexpr, ROWS: tl.constexpr,
                   COLUMNS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_inside = (rows[:, None] < num_rows) & (columns[None, :] < width)
    places = rows[:, None].to(tl.int64) * width + columns[None, :]
    y = tl.load(x + places, mask=is_inside, other=0).to(tl.float32)
    for tap in tl.static_range(TAPS):
        factor = tl.load(weight + columns * TAPS + tap, mask=columns < width, other=0).to(tl.float32)
        y += factor[None, :] * seen(x, positions, rows, columns, num_rows, width, tap - TAPS // 2)
    tl.store(out + places, y.to(out.dtype.element_ty), mask=is_inside)


@triton.jit
def backward_kernel(grad, x, positions, weight, grad_x, partial, num_rows, width, TAPS: tl.constexpr,
                    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sums = (tl.zeros([ROWS, COLUMNS], tl.float32),) * TAPS
    bias_sum = tl.zeros([COLUMNS], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        is_inside = (rows[:, None] < num_rows) & (columns[None, :] < width)
        places = rows[:, None].to(tl.int64) * width + columns[None, :]
        own = tl.load(x + places, mask=is_inside, other=0).to(tl.float32)
        gradient = tl.load(grad + places, mask=is_inside, other=0).to(tl.float32)
        for tap in tl.static_range(TAPS):
            # The row that reads this one with this tap lies on the other side.
            outer = seen(grad, positions, rows, columns, num_rows, width, TAPS // 2 - tap)
            factor = tl.load(weight + columns * TAPS + tap, mask=columns < width, other=0).to(tl.float32)
            gradient += factor[None, :] * outer
            sums = sums[1:] + (sums[0] + own * outer,)  # after the last tap they are in order again
        tl.store(grad_x + places, gradient.to(grad_x.dtype.element_ty), mask=is_inside)
        if HAS_BIAS:
            bias_sum += tl.sum(gradient, 0)
    partial += tl.program_id(0).to(tl.int64) * width * (TAPS + HAS_BIAS)
    for tap in tl.static_range(TAPS):
        tl.store(partial + columns * TAPS + tap, tl.sum(sums[tap], 0), mask=columns < width)
    if HAS_BIAS:
        tl.store(partial + width * TAPS + columns, bias_sum, mask=columns < width)


@triton.jit
def seen(pointer, positions, rows, columns, num_rows, width, WAY: tl.constexpr):
    """For each of `rows` the row WAY places after it (before it if negative), fp32; 0 if it is in another protein."""
    others = rows + WAY
    later = tl.maximum(rows, others)
    far = tl.load(positions + later, mask=later < num_rows, other=0) >= tl.maximum(WAY, -WAY)
    is_same = far & (others >= 0) & (later < num_rows)
    return tl.load(pointer + others[:, None].to(tl.int64) * width + columns[None, :],
                   mask=is_same[:, None] & (columns[None, :] < width), other=0).to(tl.float32)
