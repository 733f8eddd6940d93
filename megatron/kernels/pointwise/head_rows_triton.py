"""Device functions of the kernels in `heads_triton`: they load, transform and store some rows of one token.

A row is one head's query, key or value. A part is the same columns of each row, [rows, columns] in fp32. `starts` are
the offsets at which the rows begin; `is_there` is True for rows that exist. SIZE is the number of real columns, which
`columns` may exceed.
"""

import triton
import triton.language as tl


@triton.jit
def loaded(pointer, starts, is_there, columns, SIZE: tl.constexpr):
    """A part of each row, fp32; 0 outside."""
    is_inside = is_there[:, None] & (columns[None, :] < SIZE)
    return tl.load(pointer + starts[:, None] + columns[None, :], mask=is_inside, other=0).to(tl.float32)


@triton.jit
def gradient_of(grad, key_grad, value_grad, OFFSET: tl.constexpr, token, rows, rows_a_token, is_there, columns,
                SIZE: tl.constexpr, WIDTH: tl.constexpr, IS_APART: tl.constexpr):
    """A part of each row's gradient, fp32, from column OFFSET on.

    With IS_APART the gradients of queries, keys and values come as three tensors; else `grad` holds all of them.
    """
    if IS_APART:
        group, member = rows // 3, rows % 3  # a query, a key and a value each
        starts = (token * (rows_a_token // 3) + group) * WIDTH
        part = (loaded(grad + OFFSET, starts, is_there & (member == 0), columns, SIZE)
                + loaded(key_grad + OFFSET, starts, is_there & (member == 1), columns, SIZE)
                + loaded(value_grad + OFFSET, starts, is_there & (member == 2), columns, SIZE))
    else:
        part = loaded(grad + OFFSET, (token * rows_a_token + rows) * WIDTH, is_there, columns, SIZE)
    return part


@triton.jit
def store(pointer, starts, is_there, columns, SIZE: tl.constexpr, part):
    """Store a part of each row, rounded to the dtype of the destination."""
    is_inside = is_there[:, None] & (columns[None, :] < SIZE)
    tl.store(pointer + starts[:, None] + columns[None, :], part.to(pointer.dtype.element_ty), mask=is_inside)


@triton.jit
def centred(part, mean, columns, SIZE: tl.constexpr):
    """A part of each row minus the row's mean; 0 beyond its end."""
    return tl.where(columns[None, :] < SIZE, part - mean[:, None], 0)


@triton.jit
def scale_of(query_weight, key_weight, rows, is_there, columns, SIZE: tl.constexpr, ROWS_A_GROUP: tl.constexpr,
             WIDTH: tl.constexpr):
    """The norm's scales for a part of each row; 0 for values, which have none.

    The rows of a group are its queries, its key and its value, in this order.
    """
    group, member = rows // ROWS_A_GROUP, rows % ROWS_A_GROUP
    is_inside = is_there[:, None] & (columns[None, :] < SIZE)
    query_starts = (group * (ROWS_A_GROUP - 2) + member) * WIDTH
    of_query = tl.load(query_weight + query_starts[:, None] + columns[None, :],
                       mask=is_inside & (member < ROWS_A_GROUP - 2)[:, None], other=0).to(tl.float32)
    of_key = tl.load(key_weight + (group * WIDTH)[:, None] + columns[None, :],
                     mask=is_inside & (member == ROWS_A_GROUP - 2)[:, None], other=0).to(tl.float32)
    return of_query + of_key


@triton.jit
def place_of_scale(rows, rows_a_token, ROWS_A_GROUP: tl.constexpr):
    """Each row's index among all rows that have a scale: first the queries of all groups, then the keys."""
    group, member = rows // ROWS_A_GROUP, rows % ROWS_A_GROUP
    key_place = rows_a_token // ROWS_A_GROUP * (ROWS_A_GROUP - 2) + group
    return tl.where(member < ROWS_A_GROUP - 2, group * (ROWS_A_GROUP - 2) + member, key_place)


@triton.jit
def turned(first, second, cos, sin, token, columns, is_value, sign, HALF: tl.constexpr):
    """Both halves of each row, rotated by the token's angles (back for `sign` -1); values are unchanged."""
    turn_cos = tl.load(cos + token * HALF + columns, mask=columns < HALF, other=0)[None, :]
    turn_sin = sign * tl.load(sin + token * HALF + columns, mask=columns < HALF, other=0)[None, :]
    return (tl.where(is_value[:, None], first, first * turn_cos - second * turn_sin),
            tl.where(is_value[:, None], second, second * turn_cos + first * turn_sin))
