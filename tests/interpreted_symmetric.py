"""Checks of the Triton kernel for symmetric matrix products, interpreted on CPU tensors, against fp64.

tests/unit/test_triton_symmetric.py runs this in its own process, with TRITON_INTERPRET=1. Prints as JSON, for each
case, the largest error in units of the dtype's epsilon, and whether the product is symmetric outside the tiles on the
diagonal. (Within these tiles it is symmetric only where a dot product does not depend on the order of its factors; on
some processors it does.)
"""

import json
import os
from unittest.mock import patch

import torch

from megatron.kernels.newton_schulz import symmetric_triton
from megatron.kernels.newton_schulz.orthogonal import orthogonalised
from megatron.kernels.newton_schulz.symmetric import gram, with_square

# k, m, n of the factors: one tile and several, sizes that are no multiple of a tile, more columns than rows and fewer.
SHAPES = [(1, 1, 1), (2, 16, 64), (1, 33, 77), (2, 65, 130), (1, 200, 40), (1, 129, 129)]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}  # the interpreter gets products in bf16 wrong
CASES = [f"{name} {shape}" for name in DTYPES for shape in SHAPES]


def outcome(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[float, bool]:
    """The largest error of X Xᵀ and of a combination of it with its square, and whether both are symmetric."""
    x = (torch.randn(*shape) / shape[2]**0.5).to(dtype)
    first, second = gram(x), with_square(gram(x), -4.0, 2.0)
    exact = gram(x).double()
    errors = [(first.double() - x.double() @ x.double().mT).abs().max(),
              (second.double() - (-4 * exact + 2 * exact @ exact)).abs().max() / 8]
    tile, *_ = symmetric_triton._tile(shape[1], dtype)
    return float(max(errors)) / torch.finfo(dtype).eps, all(is_mirrored(each, tile) for each in (first, second))


def is_mirrored(product: torch.Tensor, tile: int) -> bool:
    """Whether the product is symmetric outside the tiles on the diagonal."""
    tiles = torch.arange(product.shape[-1]) // tile
    is_off = tiles[:, None] != tiles
    return torch.equal(product[..., is_off], product.mT[..., is_off])


def main() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"
    torch.manual_seed(0)
    found = {f"{name} {shape}": outcome(shape, dtype) for name, dtype in DTYPES.items() for shape in SHAPES}
    with patch.object(symmetric_triton, "_tile", lambda size, dtype: (16, 16, {})):
        found["many tiles"] = outcome((1, 16 * 6 + 5, 50), torch.float32)
    x = torch.randn(2, 40, 70)
    ours = orthogonalised(x, 5)
    with patch.dict(os.environ, {"TRITON_INTERPRET": "0"}):
        plain = orthogonalised(x, 5)
    found["orthogonalised"] = float((ours - plain).abs().max() / torch.finfo(torch.float32).eps), True
    print(json.dumps(found))


if __name__ == "__main__":
    main()
