"""Triton kernels for attention inside packed proteins on GPUs; `megatron.kernels.attention.fused` launches them.

The algorithm is FlashAttention-2 (Dao, 2023, arXiv 2307.08691): scores never reach memory; the forward pass stores the
base-2 logsumexp of each query, and the backward pass recomputes the scores. A program handles a block of tokens of the
packed line, whatever proteins lie in it. It finds their boundaries by binary search in `ends`, which only the device
reads, so that the grid depends on shapes alone. It iterates only over the range of tokens on the other side that
interact with its own: other blocks cost nothing, nor does filler, whose contexts and gradients are 0. Every sum is
computed by one program in a fixed order, so results are bitwise reproducible. The dropout mask depends only on the
seed, the head and the places of query and key, not on the blocks.

Names: a place is a token's index among the tokens of all ranks; the queries here begin at place `first`. `before` and
`behind` are how many tokens before and after itself a query sees. Shapes of tiles: [queries, keys], [queries, columns],
...; columns are the head's width, padded to a power of two. A tensor's TOKEN and GROUP are its strides, in elements,
from one token and from one group to the next.
"""

import triton
import triton.language as tl

from megatron.kernels.dropout_triton import drawn, drawn_by_column

LOG2_E = tl.constexpr(1.4426950408889634)
_AS_THEY_COME = "num_proteins", "first", "before", "behind"  # no value of these is worth a specialised kernel


@triton.jit(do_not_specialize=_AS_THEY_COME)
def forward(query, key, value, context, logsumexp, seed, ends, num_proteins, num_queries, first, before,
            behind, scale, growth, kept, first_head, QUERY_TOKEN: tl.constexpr, QUERY_GROUP: tl.constexpr,
            KEY_TOKEN: tl.constexpr, KEY_GROUP: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr,
            WIDTH: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
            PRECISION: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """Store the contexts and logsumexps of one block of queries and one head."""
    begin, head = tl.program_id(0) * BLOCK_QUERIES, tl.program_id(1)
    num_real = tl.load(ends + num_proteins)
    last_query = tl.minimum(num_queries, num_real - first)
    place = first + begin + tl.arange(0, BLOCK_QUERIES)
    low, high = _seen(place, first + last_query, ends, num_proteins, before, behind, STEPS)
    query_tile = _rows(query + head // QUERIES * QUERY_GROUP + head % QUERIES * WIDTH, begin, last_query, QUERY_TOKEN,
                       WIDTH, COLUMNS, BLOCK_QUERIES)
    key += head // QUERIES * KEY_GROUP
    value += head // QUERIES * KEY_GROUP
    # Finite rather than -inf, so that keys that a query does not see leave it unchanged.
    most = tl.full([BLOCK_QUERIES], -1e30, tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    summed = tl.zeros([BLOCK_QUERIES, COLUMNS], tl.float32)
    for start in range(_first_of(low, high) // BLOCK_KEYS * BLOCK_KEYS, tl.max(high), BLOCK_KEYS):
        key_tile = _rows(key, start, num_real, KEY_TOKEN, WIDTH, COLUMNS, BLOCK_KEYS)
        scores = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION) * (scale * LOG2_E)
        scores = tl.where(_is_within(start, low, high, BLOCK_KEYS), scores, float("-inf"))
        new_most = tl.maximum(most, tl.max(scores, 1))
        probabilities = tl.exp2(scores - new_most[:, None])
        shrunk = tl.exp2(most - new_most)
        total = total * shrunk + tl.sum(probabilities, 1)
        if HAS_DROPOUT:
            is_kept = drawn(seed, place, start, first_head + head, 0, BLOCK_KEYS) < kept
            probabilities = tl.where(is_kept, probabilities, 0.0)
        value_tile = _rows(value, start, num_real, KEY_TOKEN, WIDTH, COLUMNS, BLOCK_KEYS)
        summed = tl.dot(probabilities.to(value_tile.dtype), value_tile, summed * shrunk[:, None],
                        input_precision=PRECISION)
        most = new_most
    summed *= (growth / tl.where(total > 0, total, 1.0))[:, None]
    _put_rows(context + head * WIDTH, summed, begin, num_queries, HEADS * WIDTH, WIDTH, COLUMNS, BLOCK_QUERIES)
    row = begin + tl.arange(0, BLOCK_QUERIES)
    tl.store(logsumexp + head.to(tl.int64) * num_queries + row, tl.where(total > 0, most + tl.log2(total), 0.0),
             mask=row < num_queries)


@triton.jit(do_not_specialize=_AS_THEY_COME)
def backward_queries(grad_context, query, key, value, context, logsumexp, products, grad_query, seed, ends,
                     num_proteins, num_queries, first, before, behind, scale, growth, kept, first_head,
                     QUERY_TOKEN: tl.constexpr, QUERY_GROUP: tl.constexpr, KEY_TOKEN: tl.constexpr,
                     KEY_GROUP: tl.constexpr, GRAD_TOKEN: tl.constexpr, GRAD_GROUP: tl.constexpr, HEADS: tl.constexpr,
                     QUERIES: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
                     HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_QUERIES: tl.constexpr,
                     BLOCK_KEYS: tl.constexpr):
    """Store the gradients of one block of queries and one head, and `products`: each context dot its gradient."""
    begin, head = tl.program_id(0) * BLOCK_QUERIES, tl.program_id(1)
    num_real = tl.load(ends + num_proteins)
    last_query = tl.minimum(num_queries, num_real - first)
    place, row = first + begin + tl.arange(0, BLOCK_QUERIES), begin + tl.arange(0, BLOCK_QUERIES)
    low, high = _seen(place, first + last_query, ends, num_proteins, before, behind, STEPS)
    grad_tile = _rows(grad_context + head * WIDTH, begin, last_query, HEADS * WIDTH, WIDTH, COLUMNS, BLOCK_QUERIES)
    context_tile = _rows(context + head * WIDTH, begin, last_query, HEADS * WIDTH, WIDTH, COLUMNS, BLOCK_QUERIES)
    product = tl.sum(grad_tile.to(tl.float32) * context_tile.to(tl.float32), 1)
    statistics = head.to(tl.int64) * num_queries + row
    tl.store(products + statistics, product, mask=row < num_queries)
    logarithm = tl.load(logsumexp + statistics, mask=row < num_queries, other=0.0)
    query_tile = _rows(query + head // QUERIES * QUERY_GROUP + head % QUERIES * WIDTH, begin, last_query, QUERY_TOKEN,
                       WIDTH, COLUMNS, BLOCK_QUERIES)
    key += head // QUERIES * KEY_GROUP
    value += head // QUERIES * KEY_GROUP
    summed = tl.zeros([BLOCK_QUERIES, COLUMNS], tl.float32)
    for start in range(_first_of(low, high) // BLOCK_KEYS * BLOCK_KEYS, tl.max(high), BLOCK_KEYS):
        key_tile = _rows(key, start, num_real, KEY_TOKEN, WIDTH, COLUMNS, BLOCK_KEYS)
        value_tile = _rows(value, start, num_real, KEY_TOKEN, WIDTH, COLUMNS, BLOCK_KEYS)
        scores = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION) * (scale * LOG2_E)
        grads = tl.dot(grad_tile, tl.trans(value_tile), input_precision=PRECISION)
        if HAS_DROPOUT:
            is_kept = drawn(seed, place, start, first_head + head, 0, BLOCK_KEYS) < kept
            grads = tl.where(is_kept, grads * growth, 0.0)
        probabilities = tl.exp2(scores - logarithm[:, None])
        grads = tl.where(_is_within(start, low, high, BLOCK_KEYS), probabilities * (grads - product[:, None]), 0.0)
        summed = tl.dot(grads.to(key_tile.dtype), key_tile, summed, input_precision=PRECISION)
    grad_query += head // QUERIES * GRAD_GROUP + head % QUERIES * WIDTH
    _put_rows(grad_query, summed * scale, begin, num_queries, GRAD_TOKEN, WIDTH, COLUMNS, BLOCK_QUERIES)


@triton.jit(do_not_specialize=_AS_THEY_COME)
def backward_keys(grad_context, query, key, value, logsumexp, products, grad_key, grad_value, seed, ends, num_proteins,
                  num_queries, num_keys, first, before, behind, scale, growth, kept, first_head,
                  QUERY_TOKEN: tl.constexpr, QUERY_GROUP: tl.constexpr, KEY_TOKEN: tl.constexpr,
                  KEY_GROUP: tl.constexpr, GRAD_TOKEN: tl.constexpr, GRAD_GROUP: tl.constexpr, HEADS: tl.constexpr,
                  QUERIES: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
                  HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_QUERIES: tl.constexpr,
                  BLOCK_KEYS: tl.constexpr):
    """Store the gradients of one block of keys and values of one group, summed over its heads.

    It reads the `products` of `backward_queries`, which runs before.
    """
    begin, group = tl.program_id(0) * BLOCK_KEYS, tl.program_id(1)
    num_real = tl.load(ends + num_proteins)
    last_query = tl.minimum(num_queries, num_real - first)
    # A query sees a key `before` tokens back, so the queries that see a key lie up to `before` tokens after it.
    low, high = _seen(begin + tl.arange(0, BLOCK_KEYS), num_real, ends, num_proteins, behind, before, STEPS)
    low, high = tl.maximum(low, first), tl.minimum(high, first + last_query)
    key_tile = _rows(key + group * KEY_GROUP, begin, num_real, KEY_TOKEN, WIDTH, COLUMNS, BLOCK_KEYS)
    value_tile = _rows(value + group * KEY_GROUP, begin, num_real, KEY_TOKEN, WIDTH, COLUMNS, BLOCK_KEYS)
    summed_key = tl.zeros([BLOCK_KEYS, COLUMNS], tl.float32)
    summed_value = tl.zeros([BLOCK_KEYS, COLUMNS], tl.float32)
    start, stop = _first_of(low, high) - first, tl.max(high) - first
    for number in range(QUERIES):
        head = group * QUERIES + number
        query_head = query + group * QUERY_GROUP + number * WIDTH
        statistics = head.to(tl.int64) * num_queries
        for number_query in range(start, stop, BLOCK_QUERIES):
            row = number_query + tl.arange(0, BLOCK_QUERIES)
            query_tile = _rows(query_head, number_query, last_query, QUERY_TOKEN, WIDTH, COLUMNS, BLOCK_QUERIES)
            grad_tile = _rows(grad_context + head * WIDTH, number_query, last_query, HEADS * WIDTH, WIDTH, COLUMNS,
                              BLOCK_QUERIES)
            logarithm = tl.load(logsumexp + statistics + row, mask=row < last_query, other=0.0)
            product = tl.load(products + statistics + row, mask=row < last_query, other=0.0)
            scores = tl.dot(key_tile, tl.trans(query_tile), input_precision=PRECISION) * (scale * LOG2_E)
            is_seen = _is_within(first + number_query, low, high, BLOCK_QUERIES)
            probabilities = tl.where(is_seen, tl.exp2(scores - logarithm[None, :]), 0.0)
            grads = tl.dot(value_tile, tl.trans(grad_tile), input_precision=PRECISION)
            dropped_out = probabilities
            if HAS_DROPOUT:
                is_kept = drawn_by_column(seed, first + row, begin, first_head + head, 0, BLOCK_KEYS) < kept
                dropped_out = tl.where(is_kept, probabilities * growth, 0.0)
                grads = tl.where(is_kept, grads * growth, 0.0)
            summed_value = tl.dot(dropped_out.to(grad_tile.dtype), grad_tile, summed_value, input_precision=PRECISION)
            grads = probabilities * (grads - product[None, :])
            summed_key = tl.dot(grads.to(query_tile.dtype), query_tile, summed_key, input_precision=PRECISION)
    _put_rows(grad_key + group * GRAD_GROUP, summed_key * scale, begin, num_keys, GRAD_TOKEN, WIDTH, COLUMNS,
              BLOCK_KEYS)
    _put_rows(grad_value + group * GRAD_GROUP, summed_value, begin, num_keys, GRAD_TOKEN, WIDTH, COLUMNS, BLOCK_KEYS)


@triton.jit
def _seen(place, last, ends, num_proteins, before, behind, STEPS: tl.constexpr):
    """The range of places that each place sees, as its start and stop; both are 0 for filler and from `last` on."""
    low = place * 0  # number of boundaries, up to the filler's, known to be at or before the place
    high = low + num_proteins + 1
    for _ in tl.static_range(STEPS):  # unrolled: a loop here would prevent pipelining of the caller's
        middle = (low + high) // 2
        is_passed = low < high
        is_passed = is_passed & (tl.load(ends + middle, mask=is_passed, other=0) <= place)
        low, high = tl.where(is_passed, middle + 1, low), tl.where(is_passed, high, middle)
    is_real = (place < last) & (low <= num_proteins)
    start = tl.load(ends + low - 1, mask=is_real, other=0)
    stop = tl.load(ends + low, mask=is_real, other=0)
    first = tl.where(is_real, tl.maximum(start, place - before), 0)
    return first, tl.where(is_real, tl.minimum(stop, place + behind + 1), 0)


@triton.jit
def _first_of(low, high):
    """The smallest start of the ranges that are not empty; a huge number if all are empty."""
    return tl.min(tl.where(low < high, low, 0x3FFFFFFF))


@triton.jit
def _is_within(start, low, high, NUMBER: tl.constexpr):
    """Whether each of the NUMBER places from `start` on lies in `low:high`, [..., NUMBER]."""
    place = start + tl.arange(0, NUMBER)
    return (place[None, :] >= low[:, None]) & (place[None, :] < high[:, None])


@triton.jit
def _rows(pointer, start, stop, TOKEN: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """A tile [ROWS, COLUMNS] loaded from row `start` on; 0 from row `stop` and column WIDTH on."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    pointer += tl.cast(start, tl.int64) * TOKEN
    is_there = (start + row < stop)[:, None]
    if COLUMNS > WIDTH:
        is_there = is_there & (column < WIDTH)[None, :]
    return tl.load(pointer + row[:, None] * TOKEN + column[None, :], mask=is_there, other=0.0)


@triton.jit
def _put_rows(pointer, rows, start, stop, TOKEN: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
              ROWS: tl.constexpr):
    """Store `rows`, a tile as `_rows` loads it, without the rows from `stop` on and the padding."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    pointer += tl.cast(start, tl.int64) * TOKEN
    is_there = (start + row < stop)[:, None]
    if COLUMNS > WIDTH:
        is_there = is_there & (column < WIDTH)[None, :]
    tl.store(pointer + row[:, None] * TOKEN + column[None, :], rows.to(pointer.dtype.element_ty), mask=is_there)
