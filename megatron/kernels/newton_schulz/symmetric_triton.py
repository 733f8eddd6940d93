"""The Triton kernel for `megatron.kernels.newton_schulz.symmetric`: each program computes one lower-triangle tile.

The program also writes the tile's transpose to the other side of the diagonal, which saves half of the products. Sums
are in fp32; results are rounded to the output's dtype. Shapes: k matrices, m rows, n columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def launch(x_kmn: Tensor, factor: float, of_product: float, out_kmm: Tensor) -> None:
    """Fill `out_kmm` with factor · X + of_product · X Xᵀ for each matrix X; both tensors are contiguous.

    Unless `factor` is 0, each X is symmetric.
    """
    number, size, width = x_kmn.shape
    tile, depth, options = _tile(size, x_kmn.dtype)
    tiles = triton.cdiv(size, tile)
    symmetric_kernel[tiles * (tiles + 1) // 2, number](x_kmn, out_kmm, size, width, factor, of_product, factor != 0,
                                                       tile, depth, **options)


def _tile(size: int, dtype: torch.dtype) -> tuple[int, int, dict[str, int]]:
    """The rows of a tile, the depth of one `tl.dot`, and the warps and pipeline stages of a program."""
    if dtype == torch.float32:
        return 64, 32, {"num_warps": 4, "num_stages": 3}
    if size <= 512:  # with few tiles, smaller ones keep more of the GPU busy
        return 64, 64, {"num_warps": 4, "num_stages": 4}
    return 128, 64, {"num_warps": 8, "num_stages": 3}


@triton.jit
def symmetric_kernel(x, out, size, width, factor, of_product, HAS_FACTOR: tl.constexpr, TILE: tl.constexpr,
                     DEPTH: tl.constexpr):
    # Tiles are numbered row by row through the triangle: row r has r + 1 tiles, after r (r + 1) / 2 in earlier rows.
    number = tl.program_id(0)
    row = ((tl.sqrt(8.0 * number + 1) - 1) / 2).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > number, row - 1, row)  # the root was rounded up
    row = tl.where((row + 1) * (row + 2) // 2 <= number, row + 1, row)  # or down
    column = number - row * (row + 1) // 2
    x += tl.program_id(1).to(tl.int64) * size * width
    out += tl.program_id(1).to(tl.int64) * size * size
    rows = row * TILE + tl.arange(0, TILE)
    columns = column * TILE + tl.arange(0, TILE)
    depths = tl.arange(0, DEPTH)
    of_rows = x + rows[:, None].to(tl.int64) * width + depths[None, :]
    of_columns = x + columns[None, :].to(tl.int64) * width + depths[:, None]
    total = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, width, DEPTH):
        is_left = depths < width - start
        left = tl.load(of_rows + start, mask=(rows[:, None] < size) & is_left[None, :], other=0)
        right = tl.load(of_columns + start, mask=(columns[None, :] < size) & is_left[:, None], other=0)
        total = tl.dot(left, right, total, input_precision="ieee")
    total *= of_product
    is_inside = (rows[:, None] < size) & (columns[None, :] < size)
    if HAS_FACTOR:
        own = tl.load(x + rows[:, None].to(tl.int64) * width + columns[None, :], mask=is_inside, other=0)
        total += factor * own.to(tl.float32)
    rounded = total.to(out.dtype.element_ty)
    tl.store(out + rows[:, None].to(tl.int64) * size + columns[None, :], rounded, mask=is_inside)
    if row != column:
        tl.store(out + columns[:, None].to(tl.int64) * size + rows[None, :], tl.trans(rounded),
                 mask=(columns[:, None] < size) & (rows[None, :] < size))
