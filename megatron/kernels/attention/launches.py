"""How Triton's attention kernels are launched: grids, strides, block sizes.

Shapes: u tokens with queries, t tokens with keys and values, n heads in g groups of q, d head width, x = q rows of a
group where keys and values come as a tensor of their own, and c = q + 2 where they lie behind the queries.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from megatron.kernels.device import product_precision

# By the size of an element and the most columns: queries and keys of a block, warps and stages of a pipeline. Of some
# that were compiled the largest blocks that do not spill and fit the 99 KB of shared memory of GPUs of capability 8.6
# and 8.9 (benchmarks/triton_kernels.py). None has been timed.
_BLOCKS = {
    (2, 64): {"forward": (128, 64, 8, 3), "backward_queries": (64, 64, 4, 2), "backward_keys": (32, 64, 4, 2)},
    (2, 128): {"forward": (128, 64, 8, 2), "backward_queries": (64, 64, 8, 2), "backward_keys": (64, 64, 8, 2)},
    (2, 256): {"forward": (64, 32, 8, 2), "backward_queries": (32, 32, 8, 2), "backward_keys": (32, 32, 8, 2)},
    (4, 64): {"forward": (64, 32, 8, 2), "backward_queries": (64, 32, 8, 2), "backward_keys": (32, 64, 8, 2)},
    (4, 128): {"forward": (64, 16, 8, 2), "backward_queries": (32, 32, 8, 2), "backward_keys": (32, 32, 8, 2)},
    (4, 256): {"forward": (16, 16, 4, 2), "backward_queries": (16, 16, 4, 2), "backward_keys": (16, 16, 4, 2)},
}


@dataclass(frozen=True)
class KernelLaunch:
    """One kernel of `triton_kernels` with its grid, arguments, and what is compiled in."""

    kernel: str
    grid: tuple[int, int]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int]  # warps of a program, stages of its pipeline

    def run(self) -> None:
        """Launch it; nothing for an empty grid."""
        from megatron.kernels.attention import triton_kernels  # it imports Triton, which may be missing

        if all(self.grid):
            getattr(triton_kernels, self.kernel)[self.grid](**self.arguments, **self.constants, **self.options)


@dataclass(frozen=True)
class Call:
    """What the operator was called with."""

    qkv_ugxd: Tensor
    key_value_tg2d: Tensor | None
    cu_seqlens: Tensor
    seed: Tensor | None
    num_filler: int
    first: int
    left: int
    right: int
    kept: int  # of dropout, as `Dropout` has it
    first_head: int

    def forward(self, context_ugqd: Tensor, logsumexp_nu: Tensor) -> KernelLaunch:
        """Fills both."""
        blocks = _blocks("forward", self.qkv_ugxd)
        grid = _number(len(context_ugqd), blocks["BLOCK_QUERIES"]), len(logsumexp_nu)
        return self._launch("forward", grid, {"context": context_ugqd, "logsumexp": logsumexp_nu}, {}, blocks)

    def backward(self, grad_ugqd: Tensor, context_ugqd: Tensor, logsumexp_nu: Tensor, products_nu: Tensor,
                 gradients: tuple[Tensor, Tensor]) -> list[KernelLaunch]:
        """Fill `products_nu` and the gradients, one kernel behind the other."""
        given: dict[str, Any] = {"grad_context": grad_ugqd, "logsumexp": logsumexp_nu, "products": products_nu}
        grad_query, grad_key_value = gradients[0], gradients[self.key_value_tg2d is not None][:, :, -2:]
        blocks = _blocks("backward_queries", self.qkv_ugxd)
        grid = _number(len(grad_ugqd), blocks["BLOCK_QUERIES"]), len(logsumexp_nu)
        arguments = {**given, "context": context_ugqd, "grad_query": grad_query}
        of_queries = self._launch("backward_queries", grid, arguments, _lie(grad_query), blocks)
        blocks = _blocks("backward_keys", self.qkv_ugxd)
        grid = _number(len(grad_key_value), blocks["BLOCK_KEYS"]), grad_key_value.shape[1]
        grad_key, grad_value = grad_key_value.unbind(2)
        arguments = {**given, "grad_key": grad_key, "grad_value": grad_value, "num_keys": len(grad_key)}
        return [of_queries, self._launch("backward_keys", grid, arguments, _lie(grad_key_value), blocks)]

    def _launch(self, kernel: str, grid: tuple[int, int], arguments: dict[str, Any], gradient: dict[str, int],
                blocks: dict[str, int]) -> KernelLaunch:
        arguments_of_all, constants_of_all = self._of_all
        constants = {**constants_of_all, **{f"GRAD_{name}": size for name, size in gradient.items()}}
        options = {name: blocks.pop(name) for name in ("num_warps", "num_stages")}
        return KernelLaunch(kernel, grid, {**arguments_of_all, **arguments}, {**constants, **blocks}, options)

    @cached_property
    def _of_all(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arguments that every kernel has, and what is compiled into each."""
        qkv = _with_whole_groups(self.qkv_ugxd)
        key_value = qkv[:, :, -2:] if self.key_value_tg2d is None else _with_whole_groups(self.key_value_tg2d)
        key, value = key_value.unbind(2)
        width = key.shape[-1]
        queries = self.qkv_ugxd.shape[2] - 2 * (self.key_value_tg2d is None)
        num_proteins = len(self.cu_seqlens) - 1 - self.num_filler
        before, behind = (self.left, self.right) if self.left >= 0 else (len(key), len(key))
        arguments = {"query": qkv, "key": key, "value": value, "seed": self.seed, "ends": self.cu_seqlens,
                     "num_proteins": num_proteins, "num_queries": len(self.qkv_ugxd), "first": self.first,
                     "before": before, "behind": behind, "scale": width**-0.5,
                     "growth": 2**16 / self.kept if self.kept else 1.0, "kept": self.kept,
                     "first_head": self.first_head}
        constants = {**{f"QUERY_{name}": size for name, size in _lie(qkv).items()},
                     **{f"KEY_{name}": size for name, size in _lie(key_value).items()},
                     "HEADS": key.shape[1] * queries, "QUERIES": queries, "WIDTH": width, "COLUMNS": _columns(width),
                     "STEPS": 8 * _number((num_proteins + 1).bit_length(), 8),  # more do no harm, and compile once
                     "HAS_DROPOUT": self.seed is not None, "PRECISION": product_precision()}
        return arguments, constants


def _with_whole_groups(tensor: Tensor) -> Tensor:
    """The same, copied where the rows of a group do not lie one behind the other."""
    return tensor if tensor.stride()[2:] == (tensor.shape[-1], 1) else tensor.contiguous()


def _lie(tensor: Tensor) -> dict[str, int]:
    """How far apart tokens and groups lie."""
    return dict(zip(("TOKEN", "GROUP"), tensor.stride(), strict=False))


def _number(size: int, block: int) -> int:
    return -(-size // block)


def _columns(width: int) -> int:
    """A power of two, and no fewer than a matrix product takes."""
    return max(16, 1 << (width - 1).bit_length())


def _blocks(kernel: str, qkv_ugxd: Tensor) -> dict[str, int]:
    """Sizes of blocks and how a program runs; of half precision or fp32, by the columns of a tile."""
    columns = next(size for size in (64, 128, 256) if qkv_ugxd.shape[-1] <= size)
    chosen = _BLOCKS[qkv_ugxd.element_size(), columns][kernel]
    return dict(zip(("BLOCK_QUERIES", "BLOCK_KEYS", "num_warps", "num_stages"), chosen, strict=True))
