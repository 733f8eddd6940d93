"""A matrix product that may be without its bias, which the kernel that follows is to add on its way."""

from torch import Tensor

Product = tuple[Tensor, Tensor | None]  # [t, o], and the bias [o] that is still to be added; None where there is none


def whole(product: Product) -> Tensor:
    """The product with its bias."""
    product_to, bias_o = product
    return product_to if bias_o is None else product_to + bias_o.to(product_to.dtype)
