"""Triton kernels for `megatron.kernels.pointwise.activation`: each program handles tiles of rows and columns, in fp32.

The gradients of the biases are sums over all rows. In the backward pass each program therefore strides over the tiles
of its columns and keeps partial sums, which PyTorch then adds up. tanh-GeLU is computed as x · sigmoid(2u) with
u = sqrt(2/π) (x + 0.044715 x³), since tanh u = 2 sigmoid(2u) - 1.
Shapes: t tokens, the rows; f features, the columns; p programs with partial sums; k biases.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.kernels.device import MOST_PROGRAMS

_ROWS, _COLUMNS = 4, 512  # of a tile: 16 elements per thread


def launch_forward(wide_tf: Tensor, bias_f: Tensor | None, gate_tf: Tensor | None, gate_bias_f: Tensor | None,
                   kind: str, out_tf: Tensor) -> None:
    """Fill `out_tf` with the activation `kind` of `wide_tf` plus its bias; "swiglu" also takes a gate and its bias."""
    num_rows, width = wide_tf.shape
    forward_kernel[triton.cdiv(num_rows, _ROWS), triton.cdiv(width, _COLUMNS)](
        wide_tf, bias_f, gate_tf, gate_bias_f, out_tf, num_rows, width, kind, bias_f is not None,
        gate_bias_f is not None, _ROWS, _COLUMNS)


def launch_backward(grad_tf: Tensor, wide_tf: Tensor, bias_f: Tensor | None, gate_tf: Tensor | None,
                    gate_bias_f: Tensor | None, kind: str, grad_wide_tf: Tensor, grad_gate_tf: Tensor | None) -> Tensor:
    """Fill `grad_wide_tf` and, with a gate, `grad_gate_tf`; return the gradients of the biases given, [k, f] in fp32.

    The rows of the result are the gradients of `bias_f` and `gate_bias_f`, in this order, without any that is None.
    """
    num_rows, width = wide_tf.shape
    blocks = triton.cdiv(width, _COLUMNS)
    strips = min(triton.cdiv(num_rows, _ROWS), max(1, MOST_PROGRAMS // blocks))
    num_biases = (bias_f is not None) + (gate_bias_f is not None)
    partial_pkf = torch.empty(strips if num_biases else 0, num_biases, width, dtype=torch.float32,
                              device=wide_tf.device)
    backward_kernel[strips, blocks](
        grad_tf, wide_tf, bias_f, gate_tf, gate_bias_f, grad_wide_tf, grad_gate_tf, partial_pkf, num_rows, width, kind,
        bias_f is not None, gate_bias_f is not None, _ROWS, _COLUMNS)
    return partial_pkf.sum(0) if num_biases else partial_pkf.new_empty(0, width)


@triton.jit
def forward_kernel(wide, bias, gate, gate_bias, out, num_rows, width, KIND: tl.constexpr, HAS_BIAS: tl.constexpr,
                   HAS_GATE_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_inside = (rows[:, None] < num_rows) & (columns[None, :] < width)
    places = rows[:, None].to(tl.int64) * width + columns[None, :]
    x = tl.load(wide + places, mask=is_inside, other=0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + columns, mask=columns < width, other=0).to(tl.float32)[None, :]
    if KIND == "swiglu":
        z = tl.load(gate + places, mask=is_inside, other=0).to(tl.float32)
        if HAS_GATE_BIAS:
            z += tl.load(gate_bias + columns, mask=columns < width, other=0).to(tl.float32)[None, :]
        y = x * z * tl.sigmoid(z)
    elif KIND == "gelu_tanh":
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "gelu":
        y = 0.5 * x * (1 + tl.math.erf(0.7071067811865476 * x))
    else:
        tl.static_assert(KIND == "squared_relu")
        y = tl.maximum(x, 0) * tl.maximum(x, 0)
    tl.store(out + places, y.to(out.dtype.element_ty), mask=is_inside)


@triton.jit
def backward_kernel(grad, wide, bias, gate, gate_bias, grad_wide, grad_gate, partial, num_rows, width,
                    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE_BIAS: tl.constexpr, ROWS: tl.constexpr,
                    COLUMNS: tl.constexpr):
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if HAS_BIAS:
        shift = tl.load(bias + columns, mask=columns < width, other=0).to(tl.float32)[None, :]
        bias_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    if HAS_GATE_BIAS:
        gate_shift = tl.load(gate_bias + columns, mask=columns < width, other=0).to(tl.float32)[None, :]
        gate_bias_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        is_inside = (rows[:, None] < num_rows) & (columns[None, :] < width)
        places = rows[:, None].to(tl.int64) * width + columns[None, :]
        outer = tl.load(grad + places, mask=is_inside, other=0).to(tl.float32)
        x = tl.load(wide + places, mask=is_inside, other=0).to(tl.float32)
        if HAS_BIAS:
            x += shift
        if KIND == "swiglu":
            z = tl.load(gate + places, mask=is_inside, other=0).to(tl.float32)
            if HAS_GATE_BIAS:
                z += gate_shift
            open = tl.sigmoid(z)
            gate_gradient = outer * x * open * (1 + z * (1 - open))
            if HAS_GATE_BIAS:
                gate_bias_sum += gate_gradient
            tl.store(grad_gate + places, gate_gradient.to(grad_gate.dtype.element_ty), mask=is_inside)
            slope = z * open
        else:
            slope = slope_of(x, KIND)
        gradient = outer * slope
        if HAS_BIAS:
            bias_sum += gradient
        tl.store(grad_wide + places, gradient.to(grad_wide.dtype.element_ty), mask=is_inside)
    partial += tl.program_id(0).to(tl.int64) * (HAS_BIAS + HAS_GATE_BIAS) * width
    if HAS_BIAS:
        tl.store(partial + columns, tl.sum(bias_sum, 0), mask=columns < width)
    if HAS_GATE_BIAS:
        tl.store(partial + HAS_BIAS * width + columns, tl.sum(gate_bias_sum, 0), mask=columns < width)


@triton.jit
def slope_of(x, KIND: tl.constexpr):
    """The derivative of an activation without a gate at x."""
    if KIND == "gelu_tanh":
        share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        slope = share + x * share * (1 - share) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    elif KIND == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        slope = 0.5 * (1 + tl.math.erf(0.7071067811865476 * x)) + x * density
    else:
        tl.static_assert(KIND == "squared_relu")
        slope = 2 * tl.maximum(x, 0)
    return slope
