"""The Triton kernel of `megatron.kernels.attention.maps`: probabilities from queries, keys and the softmax's sums.

A program makes one tile of the map of one head, from as many queries and keys. Every number is written once, in fp32,
and nothing is read but queries, keys and sums.
"""

import triton
import triton.language as tl
from torch import Tensor

from megatron.kernels.device import product_precision

_LOG2_E = 1.4426950408889634


def launch_map(qkv_tgcd: Tensor, logsumexp_nt: Tensor, start: int, window: tuple[int, int] | None,
               map_nkk: Tensor) -> None:
    """Fill `map_nkk`, of the protein that begins with token `start`. Queries, keys and values lie without gaps."""
    num_tokens, num_groups, num_rows, width = qkv_tgcd.shape
    num_heads, length = map_nkk.shape[:2]
    columns = max(16, triton.next_power_of_2(width))
    # The largest that do not spill; fp32 products of more columns keep more of them in registers.
    block = 64 if qkv_tgcd.element_size() == 2 else 32 if columns <= 64 else 16
    blocks = triton.cdiv(length, block)
    before, behind = window or (length, length)
    map_kernel[blocks, blocks, num_heads](
        qkv_tgcd, logsumexp_nt, map_nkk, start, length, num_tokens, before, behind, width**-0.5 * _LOG2_E,
        num_groups * num_rows * width, num_rows, num_rows - 2, width, columns, product_precision(),
        block, num_warps=4, num_stages=1)


@triton.jit
def map_kernel(qkv, logsumexp, map, start, length, num_tokens, before, behind, scale, TOKEN: tl.constexpr,
               ROWS: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
               PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    head, column = tl.program_id(2), tl.arange(0, COLUMNS)
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    qkv += tl.cast(start, tl.int64) * TOKEN + head // QUERIES * (ROWS * WIDTH)
    query_row, key_row = query[:, None].to(tl.int64) * TOKEN, key[:, None].to(tl.int64) * TOKEN
    is_column = (column < WIDTH)[None, :]
    query_tile = tl.load(qkv + query_row + head % QUERIES * WIDTH + column[None, :],
                         mask=(query < length)[:, None] & is_column, other=0.0)
    key_tile = tl.load(qkv + key_row + QUERIES * WIDTH + column[None, :], mask=(key < length)[:, None] & is_column,
                       other=0.0)
    logarithm = tl.load(logsumexp + head.to(tl.int64) * num_tokens + start + query, mask=query < length, other=0.0)
    scores = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION) * scale
    distance = key[None, :] - query[:, None]
    is_seen = (distance >= -before) & (distance <= behind)
    probabilities = tl.where(is_seen, tl.exp2(scores - logarithm[:, None]), 0.0)
    places = (head.to(tl.int64) * length + query[:, None]) * length + key[None, :]
    tl.store(map + places, probabilities, mask=(query < length)[:, None] & (key < length)[None, :])
