"""A matrix product that may be without its bias, which the kernel that follows is to add on its way."""

import torch
from torch import Tensor

from megatron.kernels.pointwise.compiled import sum_tokens, takes_compiled

Product = tuple[Tensor, Tensor | None]  # [t, o], and the bias [o] that is still to be added; None where there is none


def whole(product: Product) -> Tensor:
    """The product with its bias."""
    product_to, bias_o = product
    return product_to if bias_o is None else product_to + bias_o.to(product_to.dtype)


def sum_over_tokens(grad_to: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias' gradient [o] in `dtype`."""
    return sum_tokens(grad_to) if takes_compiled(grad_to) and dtype == torch.float32 else grad_to.sum(0, dtype=dtype)
