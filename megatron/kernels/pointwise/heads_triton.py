"""Triton kernels for `megatron.kernels.pointwise.heads`: each program normalises and rotates some rows of a token.

A row is one head's query, key or value. Arithmetic is in fp32. Each row is split into the two halves that are rotated
against each other ("turned" in names) and the rest. The thread that holds an element of one half also holds its partner
in the other half, so the output may overwrite the input. `grads` is one tensor with the gradients of the whole
projection, or three, for queries, keys and values.
Shapes: t tokens, g groups of c = q + 2 rows (q queries, a key, a value) of width d; p programs with partial sums.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.kernels.device import MOST_WARPS
from megatron.kernels.pointwise.head_rows_triton import (
    centred,
    gradient_of,
    loaded,
    place_of_scale,
    scale_of,
    store,
    turned,
)

_ELEMENTS = 2048  # of a program's tile: 16 per thread


def launch_forward(qkv_tgcd: Tensor, query_weight: Tensor | None, key_weight: Tensor | None, cos: Tensor | None,
                   sin: Tensor | None, epsilon: float, has_mean: bool, out_tgcd: Tensor) -> None:
    """Fill `out_tgcd` with normalised and rotated queries and keys, and the values unchanged.

    `out_tgcd` may be `qkv_tgcd`; the values are then not touched. Without weights nothing is normalised; without `cos`
    and `sin` nothing is rotated.
    """
    tokens, groups, rows_a_group, _ = qkv_tgcd.shape
    rows, *sizes, num_warps = _tile(qkv_tgcd, cos)
    forward_kernel[tokens, triton.cdiv(groups * rows_a_group, rows)](
        qkv_tgcd, query_weight, key_weight, cos, sin, out_tgcd, groups * rows_a_group, epsilon, rows_a_group, *sizes,
        rows, query_weight is not None, has_mean, out_tgcd is qkv_tgcd, num_warps=num_warps)


def launch_turn_back(grads: Sequence[Tensor], cos: Tensor, sin: Tensor, has_sum: bool,
                     grad_qkv_tgcd: Tensor) -> Tensor:
    """Fill `grad_qkv_tgcd` with the gradients rotated back; return their sum over tokens [g, c, d], in fp32.

    Without `has_sum` the result is an empty tensor.
    """
    tokens, groups, rows_a_group, width = grad_qkv_tgcd.shape
    rows, *sizes, num_warps = _tile(grad_qkv_tgcd, cos)
    strips, chunks = _grid(tokens, groups * rows_a_group, rows, num_warps)
    strips = strips if has_sum else tokens
    partial_pgcd = torch.empty(strips if has_sum else 0, groups, rows_a_group, width, dtype=torch.float32,
                               device=grad_qkv_tgcd.device)
    turn_back_kernel[strips, chunks](*_three(grads), cos, sin, grad_qkv_tgcd, partial_pgcd if has_sum else None, tokens,
                                     groups * rows_a_group, rows_a_group, *sizes, rows, len(grads) > 1, has_sum,
                                     num_warps=num_warps)
    return partial_pgcd.sum(0) if has_sum else partial_pgcd.new_empty(0)


def launch_backward(grads: Sequence[Tensor], qkv_tgcd: Tensor, query_weight: Tensor, key_weight: Tensor,
                    cos: Tensor | None, sin: Tensor | None, epsilon: float, has_mean: bool,
                    grad_qkv_tgcd: Tensor) -> Tensor:
    """Fill `grad_qkv_tgcd`; return the gradients of all query scales, then all key scales, [g·(q + 1)·d] in fp32."""
    tokens, groups, rows_a_group, width = qkv_tgcd.shape
    rows, *sizes, num_warps = _tile(qkv_tgcd, cos)
    strips, chunks = _grid(tokens, groups * rows_a_group, rows, num_warps)
    partial_px = torch.empty(strips, groups * (rows_a_group - 1) * width, dtype=torch.float32, device=qkv_tgcd.device)
    backward_kernel[strips, chunks](
        *_three(grads), qkv_tgcd, query_weight, key_weight, cos, sin, grad_qkv_tgcd, partial_px, tokens,
        groups * rows_a_group, epsilon, rows_a_group, *sizes, rows, len(grads) > 1, has_mean, num_warps=num_warps)
    return partial_px.sum(0)


def _three(grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    return tuple(grads) if len(grads) > 1 else (grads[0], None, None)


def _grid(tokens: int, rows_a_token: int, rows: int, num_warps: int) -> tuple[int, int]:
    """The grid: the number of programs that share the tokens, and the number of tiles per token."""
    chunks = triton.cdiv(rows_a_token, rows)
    return min(tokens, max(1, MOST_WARPS // num_warps // chunks)), chunks


def _tile(qkv_tgcd: Tensor, cos: Tensor | None) -> tuple[int, int, int, int, int, int]:
    """A tile's rows, the widths of a row and of a rotated half, the block sizes of a half and the rest, the warps."""
    _, groups, rows_a_group, width = qkv_tgcd.shape
    half = 0 if cos is None else cos.shape[-1]
    block = triton.next_power_of_2(half) if half else 0
    rest = triton.next_power_of_2(width - 2 * half) if width > 2 * half else 0
    whole = triton.next_power_of_2(groups * rows_a_group)
    columns = triton.next_power_of_2(2 * block + rest)
    rows = max(1, min(whole, _ELEMENTS // columns))
    return rows, width, half, block, rest, min(4, max(1, rows * columns // 512))


@triton.jit
def forward_kernel(qkv, query_weight, key_weight, cos, sin, out, rows_a_token, epsilon,
                   ROWS_A_GROUP: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
                   REST: tl.constexpr, ROWS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_MEAN: tl.constexpr,
                   IS_IN_PLACE: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_value = rows % ROWS_A_GROUP == ROWS_A_GROUP - 1
    is_there = rows < rows_a_token
    if IS_IN_PLACE:
        is_there = is_there & (rows % ROWS_A_GROUP < ROWS_A_GROUP - 1)
    starts = (token * rows_a_token + rows) * WIDTH
    total = tl.zeros([ROWS], tl.float32)
    if HALF:
        columns = tl.arange(0, BLOCK)
        first = loaded(qkv, starts, is_there, columns, HALF)
        second = loaded(qkv + HALF, starts, is_there, columns, HALF)
        total += tl.sum(first, 1) + tl.sum(second, 1)
    if REST:
        rest_columns = tl.arange(0, REST)
        rest = loaded(qkv + 2 * HALF, starts, is_there, rest_columns, WIDTH - 2 * HALF)
        total += tl.sum(rest, 1)
    if HAS_NORM:
        mean = total / WIDTH if HAS_MEAN else total * 0
        squares = tl.zeros([ROWS], tl.float32)
        if HALF:
            first_hat, second_hat = centred(first, mean, columns, HALF), centred(second, mean, columns, HALF)
            squares += tl.sum(first_hat * first_hat, 1) + tl.sum(second_hat * second_hat, 1)
        if REST:
            rest_hat = centred(rest, mean, rest_columns, WIDTH - 2 * HALF)
            squares += tl.sum(rest_hat * rest_hat, 1)
        inverse = (1 / tl.sqrt(squares / WIDTH + epsilon))[:, None]
        if HALF:
            first_scale = scale_of(query_weight, key_weight, rows, is_there, columns, HALF, ROWS_A_GROUP, WIDTH)
            second_scale = scale_of(query_weight + HALF, key_weight + HALF, rows, is_there, columns, HALF,
                                    ROWS_A_GROUP, WIDTH)
            first = tl.where(is_value[:, None], first, first_hat * inverse * first_scale)
            second = tl.where(is_value[:, None], second, second_hat * inverse * second_scale)
        if REST:
            rest_scale = scale_of(query_weight + 2 * HALF, key_weight + 2 * HALF, rows, is_there, rest_columns,
                                  WIDTH - 2 * HALF, ROWS_A_GROUP, WIDTH)
            rest = tl.where(is_value[:, None], rest, rest_hat * inverse * rest_scale)
    if HALF:
        first, second = turned(first, second, cos, sin, token, columns, is_value, 1.0, HALF)
        store(out, starts, is_there, columns, HALF, first)
        store(out + HALF, starts, is_there, columns, HALF, second)
    if REST:
        store(out + 2 * HALF, starts, is_there, rest_columns, WIDTH - 2 * HALF, rest)


@triton.jit
def turn_back_kernel(grad, key_grad, value_grad, cos, sin, grad_qkv, partial, tokens, rows_a_token,
                     ROWS_A_GROUP: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
                     REST: tl.constexpr, ROWS: tl.constexpr, IS_APART: tl.constexpr, HAS_SUM: tl.constexpr):
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_value = rows % ROWS_A_GROUP == ROWS_A_GROUP - 1
    is_there = rows < rows_a_token
    columns = tl.arange(0, BLOCK)
    first_sum, second_sum = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    if REST:
        rest_columns = tl.arange(0, REST)
        rest_sum = tl.zeros([ROWS, REST], tl.float32)
    for place in range(tl.program_id(0), tokens, tl.num_programs(0)):
        token = tl.cast(place, tl.int64)
        starts = (token * rows_a_token + rows) * WIDTH
        first, second = turned(
            gradient_of(grad, key_grad, value_grad, 0, token, rows, rows_a_token, is_there, columns, HALF, WIDTH,
                        IS_APART),
            gradient_of(grad, key_grad, value_grad, HALF, token, rows, rows_a_token, is_there, columns, HALF, WIDTH,
                        IS_APART), cos, sin, token, columns, is_value, -1.0, HALF)
        store(grad_qkv, starts, is_there, columns, HALF, first)
        store(grad_qkv + HALF, starts, is_there, columns, HALF, second)
        first_sum += first
        second_sum += second
        if REST:
            rest = gradient_of(grad, key_grad, value_grad, 2 * HALF, token, rows, rows_a_token, is_there,
                               rest_columns, WIDTH - 2 * HALF, WIDTH, IS_APART)
            store(grad_qkv + 2 * HALF, starts, is_there, rest_columns, WIDTH - 2 * HALF, rest)
            rest_sum += rest
    if HAS_SUM:
        starts = (tl.program_id(0).to(tl.int64) * rows_a_token + rows) * WIDTH
        store(partial, starts, is_there, columns, HALF, first_sum)
        store(partial + HALF, starts, is_there, columns, HALF, second_sum)
        if REST:
            store(partial + 2 * HALF, starts, is_there, rest_columns, WIDTH - 2 * HALF, rest_sum)


@triton.jit
def backward_kernel(grad, key_grad, value_grad, qkv, query_weight, key_weight, cos, sin, grad_qkv, partial, tokens,
                    rows_a_token, epsilon, ROWS_A_GROUP: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
                    BLOCK: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr, IS_APART: tl.constexpr,
                    HAS_MEAN: tl.constexpr):
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_value = rows % ROWS_A_GROUP == ROWS_A_GROUP - 1
    is_there = rows < rows_a_token
    if HALF:
        columns = tl.arange(0, BLOCK)
        first_sum, second_sum = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
        first_scale = scale_of(query_weight, key_weight, rows, is_there, columns, HALF, ROWS_A_GROUP, WIDTH)
        second_scale = scale_of(query_weight + HALF, key_weight + HALF, rows, is_there, columns, HALF, ROWS_A_GROUP,
                                WIDTH)
    if REST:
        rest_columns = tl.arange(0, REST)
        rest_sum = tl.zeros([ROWS, REST], tl.float32)
        rest_scale = scale_of(query_weight + 2 * HALF, key_weight + 2 * HALF, rows, is_there, rest_columns,
                              WIDTH - 2 * HALF, ROWS_A_GROUP, WIDTH)
    for place in range(tl.program_id(0), tokens, tl.num_programs(0)):
        token = tl.cast(place, tl.int64)
        starts = (token * rows_a_token + rows) * WIDTH
        # Recompute the normalised row, and rotate the output's gradient back.
        total = tl.zeros([ROWS], tl.float32)
        if HALF:
            first, second = (loaded(qkv, starts, is_there, columns, HALF),
                             loaded(qkv + HALF, starts, is_there, columns, HALF))
            first_outer, second_outer = turned(
                gradient_of(grad, key_grad, value_grad, 0, token, rows, rows_a_token, is_there, columns, HALF, WIDTH,
                            IS_APART),
                gradient_of(grad, key_grad, value_grad, HALF, token, rows, rows_a_token, is_there, columns, HALF, WIDTH,
                            IS_APART), cos, sin, token, columns, is_value, -1.0, HALF)
            total += tl.sum(first, 1) + tl.sum(second, 1)
        if REST:
            rest = loaded(qkv + 2 * HALF, starts, is_there, rest_columns, WIDTH - 2 * HALF)
            rest_outer = gradient_of(grad, key_grad, value_grad, 2 * HALF, token, rows, rows_a_token, is_there,
                                     rest_columns, WIDTH - 2 * HALF, WIDTH, IS_APART)
            total += tl.sum(rest, 1)
        mean = total / WIDTH if HAS_MEAN else total * 0
        squares = tl.zeros([ROWS], tl.float32)
        if HALF:
            first, second = centred(first, mean, columns, HALF), centred(second, mean, columns, HALF)
            squares += tl.sum(first * first, 1) + tl.sum(second * second, 1)
        if REST:
            rest = centred(rest, mean, rest_columns, WIDTH - 2 * HALF)
            squares += tl.sum(rest * rest, 1)
        inverse = (1 / tl.sqrt(squares / WIDTH + epsilon))[:, None]
        # Gradients of the scales and of the row, less its components along the normalised row and along the mean.
        along, level = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
        if HALF:
            first, second = first * inverse, second * inverse
            first_sum += first_outer * first
            second_sum += second_outer * second
            first_inner, second_inner = first_outer * first_scale, second_outer * second_scale
            along += tl.sum(first_inner * first, 1) + tl.sum(second_inner * second, 1)
            level += tl.sum(first_inner, 1) + tl.sum(second_inner, 1)
        if REST:
            rest = rest * inverse
            rest_sum += rest_outer * rest
            rest_inner = rest_outer * rest_scale
            along += tl.sum(rest_inner * rest, 1)
            level += tl.sum(rest_inner, 1)
        along, level = (along / WIDTH)[:, None], (level / WIDTH if HAS_MEAN else level * 0)[:, None]
        if HALF:
            first = tl.where(is_value[:, None], first_outer, (first_inner - first * along - level) * inverse)
            second = tl.where(is_value[:, None], second_outer, (second_inner - second * along - level) * inverse)
            store(grad_qkv, starts, is_there, columns, HALF, first)
            store(grad_qkv + HALF, starts, is_there, columns, HALF, second)
        if REST:
            rest = tl.where(is_value[:, None], rest_outer, (rest_inner - rest * along - level) * inverse)
            store(grad_qkv + 2 * HALF, starts, is_there, rest_columns, WIDTH - 2 * HALF, rest)
    starts = tl.program_id(0).to(tl.int64) * (rows_a_token - rows_a_token // ROWS_A_GROUP) * WIDTH
    starts += place_of_scale(rows, rows_a_token, ROWS_A_GROUP) * WIDTH
    if HALF:
        store(partial, starts, is_there & ~is_value, columns, HALF, first_sum)
        store(partial + HALF, starts, is_there & ~is_value, columns, HALF, second_sum)
    if REST:
        store(partial + 2 * HALF, starts, is_there & ~is_value, rest_columns, WIDTH - 2 * HALF, rest_sum)
