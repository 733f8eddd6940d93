"""Rotary position embedding (Su et al., 2021, arXiv 2104.09864): pairs of a head's columns are rotated.

With angle a = position · base^(-2i/r), the pair (x_i, x_{i + r/2}) becomes (x_i cos a - x_{i + r/2} sin a,
x_{i + r/2} cos a + x_i sin a), i < r/2, where r is the share of the width that is turned: GPT-NeoX's order, and
ESM-2's. Angles, sines and cosines are fp32 whatever the activations are. Shapes: t tokens, g groups of heads, each with
c = q + 2 rows (queries, key, value) of width d.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

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


def rotate_reference(qkv_tgcd: Tensor, rotation: Rotation) -> Tensor:
    """The projection [t, g, c, d] with queries and keys rotated, values as they are, by PyTorch's own functions.

    The kernels are those of `megatron.kernels.pointwise.heads`.
    """
    turned, value = qkv_tgcd.split([qkv_tgcd.shape[2] - 1, 1], dim=2)
    cos, sin, half = rotation.cos, rotation.sin, rotation.cos.shape[-1]
    wide = turned.to(torch.promote_types(turned.dtype, cos.dtype))  # so that gradients too are rounded once
    first, second, rest = wide.split([half, half, wide.shape[-1] - 2 * half], dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1).to(turned.dtype)
    return torch.cat([turned, value], 2)
