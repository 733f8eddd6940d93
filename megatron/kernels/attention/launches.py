"""Launches of the Triton attention kernels: their grids, strides and block sizes.

Shapes: u tokens with queries, t tokens with keys and values, n heads in g groups of q, d head width; x rows per group:
q if keys and values come as a separate tensor, q + 2 if they follow the queries in the same tensor.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from megatron.kernels.device import product_precision

# By element size in bytes and most columns: queries per block, keys per block, warps, pipeline stages. These are the
# largest of the compiled candidates that spill no registers and fit into 99 KB of shared memory, as GPUs of compute
# capability 8.6 and 8.9 have (benchmarks/triton_kernels.py). None has been timed.
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
    """One launch of a kernel of `triton_kernels`: its grid, arguments, compile-time constants and options."""

    kernel: str
    grid: tuple[int, int]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int]  # warps of a program, stages of its software pipeline

    def run(self) -> None:
        """Launch the kernel, unless the grid is empty."""
        from megatron.kernels.attention import triton_kernels  # it imports Triton, which may be missing

        if all(self.grid):
            getattr(triton_kernels, self.kernel)[self.grid](**self.arguments, **self.constants, **self.options)


@dataclass(frozen=True)
class Call:
    """The inputs of one call of the attention operator, and the kernel launches that it takes.

    `key_value_tg2d`: None if `qkv_ugxd` has keys and values too. `cu_seqlens`: the boundaries of proteins and of the
    `num_filler` segments of filler. `first`: the place of the first query among the tokens of all ranks. `left`,
    `right`: how far a query sees; negative `left`: without limit. `first_head`: the number of the first head here.
    """

    qkv_ugxd: Tensor
    key_value_tg2d: Tensor | None
    cu_seqlens: Tensor
    seed: Tensor | None
    num_filler: int
    first: int
    left: int
    right: int
    kept: int  # of 65,536 random numbers of dropout, as in `Dropout`
    first_head: int

    def forward(self, context_ugqd: Tensor, logsumexp_nu: Tensor) -> KernelLaunch:
        """The launch that fills the context and the base-2 logsumexp."""
        blocks = _blocks("forward", self.qkv_ugxd)
        grid = _number(len(context_ugqd), blocks["BLOCK_QUERIES"]), len(logsumexp_nu)
        return self._launch("forward", grid, {"context": context_ugqd, "logsumexp": logsumexp_nu}, {}, blocks)

    def backward(self, grad_ugqd: Tensor, context_ugqd: Tensor, logsumexp_nu: Tensor, products_nu: Tensor,
                 gradients: tuple[Tensor, Tensor]) -> list[KernelLaunch]:
        """The two launches that fill `products_nu` and the gradients, to be run in this order.

        `gradients`: that of `qkv_ugxd`, and if there is one that of `key_value_tg2d`.
        """
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
        """The arguments and the compile-time constants that all kernels share."""
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
                     "STEPS": 8 * _number((num_proteins + 1).bit_length(), 8),  # extra steps only save compilations
                     "HAS_DROPOUT": self.seed is not None, "PRECISION": product_precision()}
        return arguments, constants


def _with_whole_groups(tensor: Tensor) -> Tensor:
    """The tensor, made contiguous unless the rows of each group already are."""
    return tensor if tensor.stride()[2:] == (tensor.shape[-1], 1) else tensor.contiguous()


def _lie(tensor: Tensor) -> dict[str, int]:
    """The strides of tokens and of groups, in elements."""
    return dict(zip(("TOKEN", "GROUP"), tensor.stride(), strict=False))


def _number(size: int, block: int) -> int:
    return -(-size // block)


def _columns(width: int) -> int:
    """The width rounded up to a power of two, and to at least 16, the least that `tl.dot` takes."""
    return max(16, 1 << (width - 1).bit_length())


def _blocks(kernel: str, qkv_ugxd: Tensor) -> dict[str, int]:
    """The block sizes, warps and stages of a kernel, by the tensor's element size and head width."""
    columns = next(size for size in (64, 128, 256) if qkv_ugxd.shape[-1] <= size)
    chosen = _BLOCKS[qkv_ugxd.element_size(), columns][kernel]
    return dict(zip(("BLOCK_QUERIES", "BLOCK_KEYS", "num_warps", "num_stages"), chosen, strict=True))
