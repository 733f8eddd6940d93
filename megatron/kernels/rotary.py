"""Rotary position embedding (Su et al., 2021, arXiv 2104.09864): pairs of a head's columns are rotated.

With angle a = position · base^(-2i/r), the pair (x_i, x_{i + r/2}) becomes (x_i cos a - x_{i + r/2} sin a,
x_{i + r/2} cos a + x_i sin a), i < r/2, where r is the share of the width that is turned: GPT-NeoX's order, and
ESM-2's. Angles, sines and cosines are fp32 whatever the activations are. Shapes: t tokens, g groups of heads, each with
c = q + 2 rows (queries, key, value) of width d.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.kernels.pointwise.native import prepare_heads, takes_native

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of the angles by which each token's queries and keys are rotated, fp32 [t, 1, 1, r/2] each.

    An object of its own, for FSDP2 casts every tensor that a block is called with, but not those in such an object.
    """

    cos: Tensor
    sin: Tensor


def rotation_of(positions_t: Tensor, width: int, base: float, precision: str = "fp32") -> Rotation:
    """The rotation of `width` columns, an even number, at these positions in their proteins."""
    frequencies = frequencies_of(width, base, precision, positions_t.device)
    angles = positions_t.float()[:, None, None, None] * frequencies
    return Rotation(angles.cos(), angles.sin())


def frequencies_of(width: int, base: float, precision: str, device: torch.device | None = None) -> Tensor:
    """base^(-2i/width), fp32, rounded to a `precision` first: those of the published ESM-2 are fp16's."""
    exact = 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
    return exact.to(PRECISIONS[precision]).float()


def rotate(qkv_tgcd: Tensor, rotation: Rotation) -> Tensor:
    """The projection [t, g, c, d] with queries and keys rotated, values as they are."""
    if torch.compiler.is_compiling():
        return rotate_reference(qkv_tgcd, rotation)
    return _Rotate.apply(qkv_tgcd, rotation.cos, rotation.sin)


def rotate_reference(qkv_tgcd: Tensor, rotation: Rotation) -> Tensor:
    """The same by the definition, in functions that torch.compile fuses."""
    turned, value = qkv_tgcd.split([qkv_tgcd.shape[2] - 1, 1], dim=2)
    half = rotation.cos.shape[-1]
    first, second, rest = turned.split([half, half, turned.shape[-1] - 2 * half], dim=-1)
    first, second = (first * rotation.cos - second * rotation.sin, second * rotation.cos + first * rotation.sin)
    return torch.cat([torch.cat([first.to(rest.dtype), second.to(rest.dtype), rest], -1), value], 2)


class _Rotate(torch.autograd.Function):
    """The same in two passes over memory; the backward pass rotates the gradient by the opposite angles."""

    @staticmethod
    def forward(ctx: Any, qkv_tgcd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(qkv_tgcd, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_tgcd: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad_tgcd, cos, sin, -1), None, None


def _turned(qkv_tgcd: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    if takes_native(qkv_tgcd):
        return prepare_heads(qkv_tgcd, None, None, cos, sin, 0.0, False, sign)
    wide, half = qkv_tgcd.float(), cos.shape[-1]
    out = torch.empty_like(wide, memory_format=torch.contiguous_format)
    out[:, :, -1] = wide[:, :, -1]
    out[:, :, :-1, 2 * half:] = wide[:, :, :-1, 2 * half:]
    first, second = wide[:, :, :-1, :half], wide[:, :, :-1, half:2 * half]
    torch.mul(first, cos, out=out[:, :, :-1, :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[:, :, :-1, half:2 * half]).addcmul_(first, sin, value=sign)
    return out.to(qkv_tgcd.dtype)
