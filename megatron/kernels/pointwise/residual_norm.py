"""A branch joins the residual stream, and what comes next is normalised: one pass over memory.

sum = residual + dropout(branch + its bias); normed = norm(sum): LayerNorm (Ba et al., 2016, arXiv 1607.06450) or,
without a bias, RMSNorm (Zhang and Sennrich, 2019, arXiv 1910.07467). On GPUs Triton does it, on CPUs the C++ helper, in
fp32; dropout's mask is never stored, but drawn again. Elsewhere, and where torch.compile fuses plain functions by
itself, PyTorch does. Shapes: u tokens of the residual stream on this rank, h hidden.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megatron.kernels.device import operator, takes_triton
from megatron.kernels.dropout import Dropout, dropped
from megatron.kernels.pointwise import native
from megatron.kernels.pointwise.native import takes_native
from megatron.kernels.pointwise.product import Product, whole


@dataclass(frozen=True)
class Scaling:
    """The parameters of a norm: its scale [h], its bias [h] (None: it is an RMSNorm), and epsilon."""

    weight: Tensor
    bias: Tensor | None
    epsilon: float


def normalised(x_uh: Tensor, scaling: Scaling | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x, norm(x)), both [u, h], the norm in `dtype`; without a scaling (x, x).

    Returning x too lets one backward kernel add both gradients of x: use the returned one in place of `x_uh`.
    """
    if scaling is None:
        return x_uh, x_uh
    if _is_fused(x_uh, {dtype}, None):
        return _ResidualNorm.apply(x_uh, None, None, None, scaling.weight, scaling.bias, scaling.epsilon, dtype)
    return x_uh, normalised_reference(x_uh, scaling).to(dtype)


def normalised_reference(x_uh: Tensor, scaling: Scaling) -> Tensor:
    """norm(x) [u, h] by PyTorch's own functions, in the dtype of `x_uh`; mean and variance in fp32."""
    weight_h = scaling.weight.to(x_uh.dtype)
    if scaling.bias is None:
        return F.rms_norm(x_uh, weight_h.shape, weight_h, scaling.epsilon)
    return F.layer_norm(x_uh, weight_h.shape, weight_h, scaling.bias.to(x_uh.dtype), scaling.epsilon)


def add_branch(residual_uh: Tensor, branch: Product, dropout: Dropout | None, scaling: Scaling | None,
               dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(sum, norm(sum)), both [u, h], where sum = residual + dropout(branch + its bias).

    The sum is in the residual's dtype, the norm in `dtype`; without a scaling the result is (sum, sum).
    """
    branch_uh, shift_h = branch
    if not _is_fused(residual_uh, {branch_uh.dtype, dtype}, dropout):
        return normalised(residual_uh + dropped(whole(branch), dropout), scaling, dtype)
    if scaling is not None:
        return _ResidualNorm.apply(residual_uh, branch_uh, shift_h, dropout, scaling.weight, scaling.bias,
                                   scaling.epsilon, dtype)
    if dropout is None and shift_h is None:
        sum_uh = residual_uh + branch_uh
    else:
        sum_uh = _ResidualNorm.apply(residual_uh, branch_uh, shift_h, dropout, None, None, 0.0, None)[0]
    return sum_uh, sum_uh


def after_dropout(x_uh: Tensor, dropout: Dropout | None, first_column: int = 0) -> Tensor:
    """`x_uh` [u, h] after dropout; unchanged if that is None. `first_column`: the number of the first column here."""
    if dropout is None or first_column:  # the kernels count columns from 0
        return dropped(x_uh, dropout, first_column)
    return add_branch(torch.zeros_like(x_uh), (x_uh, None), dropout, None, x_uh.dtype)[0]


def _is_fused(residual_uh: Tensor, others: set[torch.dtype], dropout: Dropout | None) -> bool:
    """Whether a kernel does the work: for a residual stream like this, with a branch and a norm in the dtypes `others`.

    Under torch.compile it does only with dropout, whose random numbers inductor would draw eight times over.
    """
    if takes_triton(residual_uh, if_compiled=dropout is not None):
        return True
    return takes_native(residual_uh, if_compiled=dropout is not None) and others <= set(native.DTYPES)


class _ResidualNorm(torch.autograd.Function):
    """(sum, norm(sum)), both [u, h]. Without a branch the sum is the residual; without a weight the norm is None.

    `shift_h`: the branch's bias, which is added here.
    """

    @staticmethod
    def forward(ctx: Any, residual_uh: Tensor, branch_uh: Tensor | None, shift_h: Tensor | None,
                dropout: Dropout | None, weight_h: Tensor | None, bias_h: Tensor | None, epsilon: float,
                dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        seed, ctx.drawn = (dropout.seed, [dropout.kept, dropout.use, dropout.first_row]) if dropout else (None, [])
        sum_uh, normed_uh, statistics_u2 = _forward(
            residual_uh, branch_uh, weight_h, dtype, shift_h, seed, ctx.drawn, bias_h, epsilon)
        if branch_uh is None:
            sum_uh = residual_uh
        # Without a norm nothing is needed but the seed.
        ctx.save_for_backward(*((sum_uh, statistics_u2, weight_h) if weight_h is not None else (None, None, None)),
                              seed)
        ctx.has_mean = bias_h is not None
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (residual_uh, branch_uh, shift_h)]
        return sum_uh, None if weight_h is None else normed_uh

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum_uh: Tensor | None, grad_normed_uh: Tensor | None) -> tuple[Tensor | None, ...]:
        x_uh, statistics_u2, weight_h, seed = ctx.saved_tensors
        residual_dtype, branch_dtype, shift_dtype = ctx.dtypes
        if grad_normed_uh is None and (grad_sum_uh is None or seed is None):
            return _of_a_plain_sum(grad_sum_uh, branch_dtype, shift_dtype)
        if grad_normed_uh is None:  # dropout alone
            x_uh, statistics_u2, weight_h, has_mean = grad_sum_uh, None, None, False
        else:
            has_mean = ctx.has_mean
        grad_residual_uh, grad_branch_uh, grads_kh = _backward(
            x_uh, weight_h, seed, has_mean, shift_dtype is not None, branch_dtype, grad_sum_uh, grad_normed_uh,
            statistics_u2, ctx.drawn)
        grads = iter(grads_kh.unbind())
        grad_weight_h = None if weight_h is None else next(grads).to(weight_h.dtype)
        grad_bias_h = None if weight_h is None or not has_mean else next(grads).to(weight_h.dtype)
        grad_shift_h = None if shift_dtype is None else next(grads).to(shift_dtype)
        of_residual_uh = grad_sum_uh if grad_normed_uh is None else grad_residual_uh
        if seed is None and branch_dtype == residual_dtype:
            grad_branch_uh = grad_residual_uh  # there is a norm: `_of_a_plain_sum` has had the rest
        return (of_residual_uh, None if branch_dtype is None else grad_branch_uh, grad_shift_h, None, grad_weight_h,
                grad_bias_h, None, None)


def _of_a_plain_sum(grad_sum_uh: Tensor | None, branch_dtype: torch.dtype | None,
                    shift_dtype: torch.dtype | None) -> tuple[Tensor | None, ...]:
    """The gradients of `forward`'s arguments where the sum alone has a gradient (or nothing has), without dropout."""
    grad_branch_uh = grad_shift_h = None
    if grad_sum_uh is not None and branch_dtype is not None:
        grad_branch_uh = grad_sum_uh.to(branch_dtype)
        grad_shift_h = None if shift_dtype is None else grad_sum_uh.sum(0, dtype=shift_dtype)
    return grad_sum_uh, grad_branch_uh, grad_shift_h, None, None, None, None, None


def _of(tensor: Tensor) -> Any:
    """The module with the kernels for such a tensor: the C++ helper's or Triton's."""
    if native.runs_native(tensor, if_compiled=True):
        return native
    from megatron.kernels.pointwise import residual_norm_triton  # it imports Triton, which may be missing

    return residual_norm_triton


# Results that are not asked for are empty. `drawn`: how many of dropout's 65,536 numbers are kept, its use, and the
# first row; empty without dropout.
@operator("residual_norm", lambda *inputs: _outputs(*inputs[:4]))
def _forward(residual_uh: Tensor, branch_uh: Tensor | None, weight_h: Tensor | None, dtype: torch.dtype | None,
             shift_h: Tensor | None, seed: Tensor | None, drawn: list[int], bias_h: Tensor | None,
             epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    residual_uh, branch_uh = residual_uh.contiguous(), None if branch_uh is None else branch_uh.contiguous()
    outputs = _outputs(residual_uh, branch_uh, weight_h, dtype)
    _of(residual_uh).join(residual_uh, branch_uh, shift_h, seed, drawn, weight_h, bias_h, epsilon, *outputs)
    return outputs


def _outputs(residual_uh: Tensor, branch_uh: Tensor | None, weight_h: Tensor | None,
             dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for the sum, the norm, and each row's mean (unused by RMSNorm) and 1 / standard deviation."""
    shape = residual_uh.shape
    return (residual_uh.new_empty(shape if branch_uh is not None else 0),
            residual_uh.new_empty(shape if weight_h is not None else 0, dtype=dtype),
            residual_uh.new_empty((len(residual_uh), 2) if weight_h is not None else 0, dtype=torch.float32))


@operator("residual_norm_backward", lambda *inputs: _gradients(*inputs[:6]))
def _backward(x_uh: Tensor, weight_h: Tensor | None, seed: Tensor | None, has_mean: bool, has_shift: bool,
              branch_dtype: torch.dtype | None, grad_sum_uh: Tensor | None, grad_normed_uh: Tensor | None,
              statistics_u2: Tensor | None, drawn: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    grad_sum_uh, grad_normed_uh = (None if gradient is None else gradient.contiguous()
                                   for gradient in (grad_sum_uh, grad_normed_uh))
    x_uh = x_uh.contiguous()
    grad_residual_uh, grad_branch_uh, _ = _gradients(x_uh, weight_h, seed, has_mean, has_shift, branch_dtype)
    grads_kh = _of(x_uh).join_backward(
        grad_sum_uh, grad_normed_uh, x_uh, statistics_u2, weight_h, seed, drawn, has_mean, has_shift,
        *(each if each.numel() else None for each in (grad_residual_uh, grad_branch_uh)))
    return grad_residual_uh, grad_branch_uh, grads_kh


def _gradients(x_uh: Tensor, weight_h: Tensor | None, seed: Tensor | None, has_mean: bool, has_shift: bool,
               branch_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for the gradients of the residual, of the branch, and of weight, bias and shift [k, h].

    Those of residual and branch are empty where they are the sum's, or the residual's, unchanged.
    """
    has_branch = branch_dtype is not None and (seed is not None or branch_dtype != x_uh.dtype)
    num_sums = (weight_h is not None) + has_mean + has_shift
    return (x_uh.new_empty(x_uh.shape if weight_h is not None else 0),
            x_uh.new_empty(x_uh.shape if has_branch else 0, dtype=branch_dtype),
            x_uh.new_empty((num_sums, x_uh.shape[1]), dtype=torch.float32))
