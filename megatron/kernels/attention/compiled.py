"""Attention of packed proteins on CPUs by a compiled helper: scores never reach memory.

It takes fp32 and bf16 (products of bf16 numbers where the processor has them, fp32 sums everywhere), windows, groups of
queries and any width; not dropout. For the backward pass, which makes the scores anew, it keeps the softmax's largest
score and sum for each query. Without a C++ compiler or pybind11 it is missing, and
`megatron.kernels.attention.by_protein` does the same work. Shapes: t tokens, g groups, each with c = q + 2
rows of width d: queries, key, value.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from megatron.kernels.attention.by_protein import Window
from megatron.kernels.device import takes_gpu_way
from megatron.kernels.packed_sequence import protein_lengths

try:
    _helper: Any = import_module("megatron.kernels.attention._packed_attention")
except ImportError:
    _helper = None

# What this processor can run, the fastest first: avx512_bf16, avx512, avx2, portable. Empty without the helper.
INSTRUCTION_SETS: tuple[str, ...] = () if _helper is None else tuple(_helper.instruction_sets())
_UNBOUNDED = 2**40  # a window that ends nowhere


def takes_helper(qkv_tgcd: Tensor, dropout: float) -> bool:
    """Whether the helper is there and takes these: it reads memory of the host."""
    if takes_gpu_way(qkv_tgcd) or dropout:
        return False
    return bool(INSTRUCTION_SETS) and qkv_tgcd.dtype in (torch.float32, torch.bfloat16)


def compiled_attention(qkv_tgcd: Tensor, cu_seqlens: Tensor, num_filler: int, window: Window,
                  instructions: str = "") -> Tensor:
    """The context [t, n, d] of whole proteins, 0 in the filler; `instructions` names another set than the fastest."""
    left, right = window or (-1, -1)
    arguments = qkv_tgcd, cu_seqlens, num_filler, left, right, instructions
    context_tgqd = _operator(*arguments)[0] if torch.compiler.is_compiling() else _Attention.apply(*arguments)
    return context_tgqd.flatten(1, 2)


class _Attention(torch.autograd.Function):
    """The same without what an operator costs a call."""

    @staticmethod
    def forward(ctx: Any, qkv_tgcd: Tensor, cu_seqlens: Tensor, *numbers: Any) -> Tensor:
        context_tgqd, statistics_tgq2 = _forward(qkv_tgcd, cu_seqlens, *numbers)
        ctx.save_for_backward(qkv_tgcd, cu_seqlens, context_tgqd, statistics_tgq2)
        ctx.numbers = numbers
        return context_tgqd

    @staticmethod
    def backward(ctx: Any, grad_tgqd: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        return _backward(grad_tgqd, *ctx.saved_tensors, *ctx.numbers), None, None, None, None, None


def _forward(qkv_tgcd: Tensor, cu_seqlens: Tensor, num_filler: int, left: int, right: int,
             instructions: str) -> tuple[Tensor, Tensor]:
    qkv_tgcd, lengths = qkv_tgcd.contiguous(), protein_lengths(cu_seqlens, num_filler)
    context_tgqd = torch.empty_like(qkv_tgcd[:, :, :-2], memory_format=torch.contiguous_format)
    statistics_tgq2 = torch.empty(*context_tgqd.shape[:-1], 2)
    context_tgqd[sum(lengths):] = 0
    statistics_tgq2[sum(lengths):] = 0
    _attend(instructions, lengths, (left, right), statistics_tgq2, qkv_tgcd, qkv_tgcd[:, :, -2:], context_tgqd)
    return context_tgqd, statistics_tgq2


def _backward(grad_tgqd: Tensor, qkv_tgcd: Tensor, cu_seqlens: Tensor, context_tgqd: Tensor, statistics_tgq2: Tensor,
              num_filler: int, left: int, right: int, instructions: str) -> Tensor:
    qkv_tgcd, lengths = qkv_tgcd.contiguous(), protein_lengths(cu_seqlens, num_filler)
    grad_tgcd = torch.empty_like(qkv_tgcd)
    grad_tgcd[sum(lengths):] = 0
    _attend(instructions, lengths, (left, right), statistics_tgq2, qkv_tgcd, qkv_tgcd[:, :, -2:], context_tgqd,
            grad_tgqd.contiguous(), grad_tgcd, grad_tgcd[:, :, -2:])
    return grad_tgcd


def _attend(instructions: str, lengths: list[int], window: tuple[int, int], statistics_tgq2: Tensor,
            *tensors: Tensor) -> None:
    """Fill context and statistics, or with a gradient of the context those of queries, keys and values."""
    if not lengths:
        return
    context_tgqd = tensors[2]
    reach = (_UNBOUNDED, _UNBOUNDED) if window[0] < 0 else window
    places = [(tensor.data_ptr(), *tensor.stride()[:2]) for tensor in tensors]
    _helper.attend(instructions or INSTRUCTION_SETS[0], torch.get_num_threads(), context_tgqd.dtype == torch.bfloat16,
                   lengths, (0, len(context_tgqd)), context_tgqd.shape[1:], reach, places, statistics_tgq2.data_ptr())


# The same as an operator that torch.compile takes as it is; traced, each new list of lengths would compile anew. A
# window of -1 is none.
@torch.library.custom_op("megatron::compiled_attention", mutates_args=())
def _operator(qkv_tgcd: Tensor, cu_seqlens: Tensor, num_filler: int, left: int, right: int,
              instructions: str) -> tuple[Tensor, Tensor]:
    return _forward(qkv_tgcd, cu_seqlens, num_filler, left, right, instructions)


@torch.library.custom_op("megatron::compiled_attention_backward", mutates_args=())
def _operator_backward(grad_tgqd: Tensor, qkv_tgcd: Tensor, cu_seqlens: Tensor, context_tgqd: Tensor,
                       statistics_tgq2: Tensor, num_filler: int, left: int, right: int, instructions: str) -> Tensor:
    return _backward(grad_tgqd, qkv_tgcd, cu_seqlens, context_tgqd, statistics_tgq2, num_filler, left, right,
                     instructions)


@_operator.register_fake
def _(qkv_tgcd: Tensor, cu_seqlens: Tensor, num_filler: int, left: int, right: int,
      instructions: str) -> tuple[Tensor, Tensor]:
    shape = qkv_tgcd[:, :, :-2].shape
    return qkv_tgcd.new_empty(shape), qkv_tgcd.new_empty((*shape[:-1], 2), dtype=torch.float32)


@_operator_backward.register_fake
def _(grad_tgqd: Tensor, qkv_tgcd: Tensor, cu_seqlens: Tensor, context_tgqd: Tensor, statistics_tgq2: Tensor,
      num_filler: int, left: int, right: int, instructions: str) -> Tensor:
    return torch.empty_like(qkv_tgcd, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv_tgcd, cu_seqlens, *ctx.numbers = inputs
    ctx.save_for_backward(qkv_tgcd, cu_seqlens, *output)


def _go_back(ctx: Any, grad_tgqd: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None, None]:
    return _operator_backward(grad_tgqd, *ctx.saved_tensors, *ctx.numbers), None, None, None, None, None


_operator.register_autograd(_go_back, setup_context=_keep)
