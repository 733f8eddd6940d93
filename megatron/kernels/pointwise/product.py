"""A matrix product, and its bias if the kernel that follows is to add it, which saves a pass over memory.

Shapes: t tokens, o features out.
"""

import torch
from torch import Tensor

from megatron.kernels.pointwise.native import sum_tokens, takes_native

Product = tuple[Tensor, Tensor | None]  # [t, o], and the bias [o] that is still to be added, or None


def whole(product: Product) -> Tensor:
    """The product [t, o] with its bias added."""
    product_to, bias_o = product
    return product_to if bias_o is None else product_to + bias_o.to(product_to.dtype)


def sum_over_tokens(grad_to: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias' gradient: the sum of the product's gradient over the tokens, [o] in `dtype`."""
    return sum_tokens(grad_to) if takes_native(grad_to) and dtype == torch.float32 else grad_to.sum(0, dtype=dtype)
