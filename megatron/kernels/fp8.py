"""Matrix products in FP8: numbers of 8 bits, and scales that bring what a tensor holds into their range.

E4M3 has 3 bits of mantissa and goes to 448, E5M2 has 2 and goes to 57,344 (Micikevicius et al., 2022, arXiv
2209.05433). A scale is the largest magnitude, as it is now or was in the last steps, over the largest number of the
format, rounded up to a power of two: so scaling rounds nothing, and what is above the subnormal numbers, and is not cut
off at the largest, comes out the same whatever the scale is. `Scaling` says what shares one: the whole tensor; in a
product each row of the left and each column of the right factor; or, as the OCP's Microscaling Formats (MXFP8, 2023)
have it, 32 neighbours along the dimension that is summed over. Shapes: r rows, c columns of any matrix; in a product
[r, k] and [c, k], of which k is summed over.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron.config import PrecisionConfig
from megatron.errors import ConfigError
from megatron.kernels.device import in_one_kernel, takes_gpu_way

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Scaling = Literal["tensorwise", "rowwise", "mxfp8"]
MX_BLOCK = 32
_LEAST = 2.0**-126  # of the scales: below it fp32 has no power of two that is normal


@dataclass(frozen=True)
class Delay:
    """Delayed scaling: a tensor's scale follows from its largest magnitudes in the last `num_steps` steps.

    That is from the largest of them if `takes_max`, else from the last. Magnitudes may grow by a factor of 2^margin
    before they are clamped.
    """

    num_steps: int
    takes_max: bool
    margin: int


@dataclass(frozen=True)
class Recipe:
    """How matrix products are computed in FP8. Inputs and weights are in E4M3, gradients in the dtype `gradients`.

    `delay`: the delayed scaling of inputs and gradients; None where each is scaled by its own present magnitudes.
    """

    scaling: Scaling
    gradients: torch.dtype
    delay: Delay | None = None

    @property
    def multiple(self) -> int:
        """What all sizes of a product must be divisible by: 16 for cuBLAS, 32 for MXFP8, whose blocks are whole."""
        return MX_BLOCK if self.scaling == "mxfp8" else 16


def recipe_of(precision: PrecisionConfig) -> Recipe | None:
    """The recipe of the blocks' matrix products that the flags ask for; None where these are not in FP8."""
    if precision.fp8 is None:
        return None
    gradients = E5M2 if precision.fp8 == "hybrid" else E4M3
    if precision.fp8_recipe == "delayed":
        takes_max = precision.fp8_amax_compute_algo == "max"
        return Recipe("tensorwise", gradients, Delay(precision.fp8_amax_history_len, takes_max, precision.fp8_margin))
    scaling: Any = precision.fp8_recipe
    return Recipe(scaling, gradients)


class Quantised(NamedTuple):
    """A matrix in FP8: `values` [r, c], to be multiplied by `scale`.

    The scale is fp32 [1, 1] (tensorwise), [r, 1] or [1, c] (rowwise); of MXFP8 it is a power of two, stored as its
    exponent + 127 in a byte, [r, c / 32] or [r / 32, c].
    """

    values: Tensor
    scale: Tensor

    def along(self, dim: int) -> "Quantised":
        """The operand of a product that sums over dimension `dim`: transposed if need be, so that this is the last one.

        It is contiguous then: tensor cores before Blackwell read FP8 in no other layout.
        """
        if dim == 1:
            return self
        # A clone: of a line `contiguous` would keep the strides, at which scaled_mm looks.
        scale = self.scale.t().clone(memory_format=torch.contiguous_format)
        return Quantised(self.values.t().contiguous(), scale)


def largest(x_rc: Tensor, scaling: Scaling, dim: int) -> Tensor:
    """The largest magnitude (amax) of each group of numbers that shares a scale, fp32, shaped like `Quantised.scale`.

    `dim`: the dimension that the product sums over.
    """
    return _largest(x_rc, scaling, dim)


def quantised(x_rc: Tensor, amax: Tensor, scaling: Scaling, dtype: torch.dtype) -> Quantised:
    """`x_rc` in the FP8 format `dtype`, scaled so that `amax` fits; what is larger is clamped to the largest number.

    `amax`: what `largest` returns, of this tensor or (delayed scaling) of earlier ones. The result is NaN where `x_rc`
    or `amax` is not finite.
    """
    return Quantised(*_quantised(x_rc, amax, scaling, dtype))


def product(a_rk: Quantised, b_ck: Quantised, dtype: torch.dtype, is_fast: bool = False) -> Tensor:
    """a bᵀ [r, c] in `dtype`, summed in fp32, or with `is_fast` in fewer bits, which is faster on Hopper.

    On GPUs rowwise scaled products are rounded to bf16 on the way.
    """
    if not takes_gpu_way(a_rk.values):
        return product_reference(a_rk, b_ck, dtype)
    is_rowwise = a_rk.scale.dtype == torch.float32 and a_rk.scale.numel() > 1
    return _scaled_product(a_rk, b_ck, torch.bfloat16 if is_rowwise else dtype, is_fast).to(dtype)


def product_reference(a_rk: Quantised, b_ck: Quantised, dtype: torch.dtype) -> Tensor:
    """a bᵀ [r, c] in `dtype` by PyTorch's own fp32 product of the dequantised operands."""
    return (dequantised(a_rk) @ dequantised(b_ck).t()).to(dtype)


def dequantised(x: Quantised) -> Tensor:
    """The numbers that `x` stands for, fp32 [r, c], exact."""
    scale = x.scale if x.scale.dtype == torch.float32 else (x.scale.to(torch.int32) << 23).view(torch.float32)
    return _scaled(x.values, scale)


def least_capability(recipe: Recipe) -> tuple[int, int]:
    """The least compute capability of a GPU that computes such products."""
    return (10, 0) if recipe.scaling == "mxfp8" else (8, 9)


def way_of(recipe: Recipe, device: torch.device) -> str:
    """What computes the products on `device`, in words for the log; raises ConfigError for a GPU that cannot."""
    if device.type == "cpu":
        return "PyTorch in fp32, of numbers rounded to FP8 (slow: no CPU multiplies FP8)"
    if device.type == "cuda":
        has, needs = torch.cuda.get_device_capability(device), least_capability(recipe)
        if has < needs:
            what = "--fp8-recipe mxfp8" if has >= (8, 9) else "--fp8"
            remedy = "give --fp8-recipe tensorwise" if has >= (8, 9) else "leave it out"
            raise ConfigError(f"{what} needs a GPU of compute capability {needs[0]}.{needs[1]} or later, and "
                              f"{torch.cuda.get_device_name(device)} has {has[0]}.{has[1]}; {remedy}")
    return "scaled_mm"


@in_one_kernel("fp8_largest")
def _largest(x_rc: Tensor, scaling: str, dim: int) -> Tensor:
    sizes = x_rc.abs()
    if scaling == "tensorwise":
        return sizes.amax().float().view(1, 1)
    if scaling == "rowwise":
        return sizes.amax(dim, keepdim=True).float()
    return sizes.unflatten(dim, (-1, MX_BLOCK)).amax(dim + 1).float()


@in_one_kernel("fp8_quantised")
def _quantised(x_rc: Tensor, amax: Tensor, scaling: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    most = torch.finfo(dtype).max
    # Up to a power of two: what lies above one carries into the exponent, and leaves no mantissa.
    bits = ((amax / most).clamp(min=_LEAST).view(torch.int32) + 0x7FFFFF) & 0x7F800000
    scale = torch.where(amax.isfinite(), bits.view(torch.float32), amax)
    # Converting does not saturate, and a scale that is shared may come from another tensor.
    values_rc = torch.where(x_rc.isfinite(), _scaled(x_rc, 1 / scale).clamp(-most, most), torch.nan).to(dtype)
    return values_rc, scale if scaling != "mxfp8" else (scale.view(torch.int32) >> 23).to(torch.uint8)


def _scaled(x_rc: Tensor, scale: Tensor) -> Tensor:
    """`x_rc` times its scale (of any of the shapes of `Quantised.scale`), fp32 [r, c]."""
    for dim in range(2):
        if scale.shape[dim] not in (1, x_rc.shape[dim]):
            blocks = x_rc.unflatten(dim, (scale.shape[dim], MX_BLOCK))
            return (blocks.float() * scale.unsqueeze(dim + 1)).flatten(dim, dim + 1)
    return x_rc.float() * scale


def _scaled_product(a_rk: Quantised, b_ck: Quantised, dtype: torch.dtype, is_fast: bool) -> Tensor:
    scale_a, scale_b, has_blocks = a_rk.scale, b_ck.scale.t(), a_rk.scale.dtype == torch.uint8
    if has_blocks:
        scale_a, scale_b = (swizzled(x.scale).view(torch.float8_e8m0fnu) for x in (a_rk, b_ck))
    is_fast = is_fast and not has_blocks
    if torch.compiler.is_compiling():
        # torch.compile does not know the public function in torch 2.11, and in 2.13 not with scales of blocks.
        return torch._scaled_mm(a_rk.values, b_ck.values.t(), scale_a, scale_b, out_dtype=dtype,
                                use_fast_accum=is_fast)
    of_fp32 = F.ScalingType.RowWise if scale_a.numel() > 1 else F.ScalingType.TensorWise
    kind = F.ScalingType.BlockWise1x32 if has_blocks else of_fp32
    order = F.SwizzleType.SWIZZLE_32_4_4 if has_blocks else F.SwizzleType.NO_SWIZZLE
    return F.scaled_mm(a_rk.values, b_ck.values.t(), scale_a, kind, scale_b, kind, order, order, output_dtype=dtype,
                       use_fast_accum=is_fast)


def swizzled(scale_rb: Tensor) -> Tensor:
    """The scales of blocks in the order in which cuBLAS reads them: tiles of 128 rows and 4 columns, padded with 0.

    In a tile row i and column j are at 16 (i mod 32) + 4 (i div 32) + j (cuBLAS, "1D Block Scaling Factors Layout").
    """
    rows, columns = scale_rb.shape
    scale_rb = F.pad(scale_rb, (0, -columns % 4, 0, -rows % 128))
    tiles = scale_rb.view(scale_rb.shape[0] // 128, 4, 32, scale_rb.shape[1] // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).flatten()
