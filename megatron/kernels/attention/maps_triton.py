"""The Triton kernel for `megatron.kernels.attention.maps`: attention probabilities from queries, keys and logsumexps.

Each program computes one square tile of one head's map. Every probability is written once, in fp32; only queries, keys
and logsumexps are read. Shapes: t tokens, n heads in g groups of c rows (queries, key, value) of width d; k tokens of
the protein.
"""

import triton
import triton.language as tl
from torch import Tensor

from megatron.kernels.device import product_precision

_LOG2_E = 1.4426950408889634


def launch_map(qkv_tgcd: Tensor, logsumexp_nt: Tensor, start: int, window: tuple[int, int] | None,
               map_nkk: Tensor) -> None:
    """Fill `map_nkk` (queries, keys) for the protein that begins at token `start`; `qkv_tgcd` is contiguous.

    `logsumexp_nt` is in base 2. `window`: how many tokens before and after itself a query attends to; None: all.
    """
    num_tokens, num_groups, num_rows, width = qkv_tgcd.shape
    num_heads, length = map_nkk.shape[:2]
    columns = max(16, triton.next_power_of_2(width))
    # The largest blocks that do not spill registers; fp32 products of wider heads need more registers.
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
