"""Attention of packed proteins on CPUs by a C++ helper: scores never reach memory.

It takes fp32 and bf16 (products of bf16 numbers where the processor has them, fp32 sums everywhere), windows, groups of
queries, any width and dropout. For the backward pass, which makes the scores anew, it keeps the softmax's largest score
and sum for each query. Without a C++ compiler or pybind11 it is missing, and `megatron.kernels.attention.by_protein`
does the same work.
Shapes: u tokens with queries, t tokens with keys and values, g groups, each with c = q + 2 rows of width d: queries,
key, value.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.kernels.attention.by_protein import Window
from megatron.kernels.dropout import Dropout, Use
from megatron.kernels.packed_sequence import PackedSequence, protein_lengths

try:
    _helper: Any = import_module("megatron.kernels.attention._packed_attention")
except ImportError:
    _helper = None

# What this processor can run, the fastest first, of avx512_bf16, avx512, avx2, portable: whether the first of these is
# the fastest is measured (0.3 ms). Empty without the helper.
INSTRUCTION_SETS: tuple[str, ...] = () if _helper is None else tuple(_helper.instruction_sets())
_UNBOUNDED = 2**40  # a window that ends nowhere
_ALL = 2**16  # numbers of dropout


def native_attention(qkv_tgcd: Tensor, sequence: PackedSequence, dropout: Dropout | None, window: Window,
                       instructions: str = "") -> Tensor:
    """The context [t, n, d] of whole proteins, 0 in the filler; `instructions` names another set than the fastest."""
    left, right = window or (-1, -1)
    seed, rate, first_head = (dropout.seed, dropout.rate, dropout.first_head) if dropout else (None, 0.0, 0)
    arguments = (qkv_tgcd, sequence.cu_seqlens, seed, sequence.num_filler, left, right, rate, first_head, instructions)
    context_tgqd = _operator(*arguments)[0] if torch.compiler.is_compiling() else _Attention.apply(*arguments)
    return context_tgqd.flatten(1, 2)


class NativePass:
    """Forward and backward pass over proteins of these lengths; the queries are those of u tokens from `start` on."""

    def __init__(self, lengths: Sequence[int], start: int, num_queries: int, window: Window,
                 dropout: Dropout | None = None, instructions: str = "") -> None:
        self.lengths, self.here = list(lengths), (start, start + num_queries)
        self.num_real = min(max(sum(self.lengths) - start, 0), num_queries)  # queries of proteins, not of filler
        self.window = window or (_UNBOUNDED, _UNBOUNDED)
        self.dropout = (int(dropout.seed) % 2**64, dropout.kept, dropout.first_head) if dropout else (0, _ALL, 0)
        self.instructions = instructions or INSTRUCTION_SETS[0]

    def forward(self, query_ugqd: Tensor, key_value_tg2d: Tensor) -> tuple[Tensor, Tensor]:
        """The context [u, g, q, d], 0 behind the last protein; the softmax's statistics [u, g, q, 2]."""
        context_ugqd = torch.empty_like(query_ugqd, memory_format=torch.contiguous_format)
        statistics_ugq2 = context_ugqd.new_empty(*context_ugqd.shape[:-1], 2, dtype=torch.float32)
        context_ugqd[self.num_real:] = 0
        statistics_ugq2[self.num_real:] = 0
        self._attend(statistics_ugq2, query_ugqd, key_value_tg2d, context_ugqd)
        return context_ugqd, statistics_ugq2

    def backward(self, grad_ugqd: Tensor, inputs: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor],
                 made: Sequence[Tensor]) -> None:
        """Fill `gradients` of `inputs`, queries and keys with values, from that of the context; `made` is forward's.

        Those of keys and values of proteins without a query here are left as they are.
        """
        context_ugqd, statistics_ugq2 = made
        gradients[0][self.num_real:] = 0
        self._attend(statistics_ugq2, *inputs, context_ugqd, grad_ugqd.contiguous(), *gradients)

    def _attend(self, statistics_ugq2: Tensor, *tensors: Tensor) -> None:
        """Fill context and statistics, or with a gradient of the context those of queries, keys and values."""
        context_ugqd = tensors[2]
        places = [(tensor.data_ptr(), *tensor.stride()[:2]) for tensor in tensors]
        _helper.attend(self.instructions, torch.get_num_threads(), context_ugqd.dtype == torch.bfloat16, self.lengths,
                       self.here, context_ugqd.shape[1:], self.window, self.dropout, places, statistics_ugq2.data_ptr())


class _Attention(torch.autograd.Function):
    """The same without what an operator costs a call."""

    @staticmethod
    def forward(ctx: Any, qkv_tgcd: Tensor, cu_seqlens: Tensor, seed: Tensor | None, *numbers: Any) -> Tensor:
        made = _forward(qkv_tgcd, cu_seqlens, seed, *numbers)
        ctx.save_for_backward(qkv_tgcd, cu_seqlens, seed, *made)
        ctx.numbers = numbers
        return made[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_tgqd: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(grad_tgqd, *ctx.saved_tensors, *ctx.numbers), None, None, *(None for _ in ctx.numbers)


def _pass(num_tokens: int, cu_seqlens: Tensor, seed: Tensor | None, num_filler: int, left: int, right: int,
          rate: float, first_head: int, instructions: str) -> NativePass:
    window = None if left < 0 else (left, right)
    dropout = None if seed is None else Dropout(rate, seed, Use.PROBABILITIES, first_head=first_head)
    return NativePass(protein_lengths(cu_seqlens, num_filler), 0, num_tokens, window, dropout, instructions)


def _forward(qkv_tgcd: Tensor, cu_seqlens: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    qkv_tgcd = qkv_tgcd.contiguous()
    return _pass(len(qkv_tgcd), cu_seqlens, *others).forward(qkv_tgcd[:, :, :-2], qkv_tgcd[:, :, -2:])


def _backward(grad_tgqd: Tensor, qkv_tgcd: Tensor, cu_seqlens: Tensor, seed: Tensor | None, context_tgqd: Tensor,
              statistics_tgq2: Tensor, *numbers: Any) -> Tensor:
    going, qkv_tgcd = _pass(len(qkv_tgcd), cu_seqlens, seed, *numbers), qkv_tgcd.contiguous()
    grad_tgcd = torch.empty_like(qkv_tgcd)
    grad_tgcd[going.num_real:] = 0
    inputs, gradients = ((tensor[:, :, :-2], tensor[:, :, -2:]) for tensor in (qkv_tgcd, grad_tgcd))
    going.backward(grad_tgqd, inputs, gradients, (context_tgqd, statistics_tgq2))
    return grad_tgcd


# The same as an operator that torch.compile takes as it is; traced, each new list of lengths would compile anew. A
# window of -1 is none.
@torch.library.custom_op("megatron::native_attention", mutates_args=())
def _operator(qkv_tgcd: Tensor, cu_seqlens: Tensor, seed: Tensor | None, num_filler: int, left: int, right: int,
              rate: float, first_head: int, instructions: str) -> tuple[Tensor, Tensor]:
    return _forward(qkv_tgcd, cu_seqlens, seed, num_filler, left, right, rate, first_head, instructions)


@torch.library.custom_op("megatron::native_attention_backward", mutates_args=())
def _operator_backward(grad_tgqd: Tensor, qkv_tgcd: Tensor, cu_seqlens: Tensor, seed: Tensor | None,
                       context_tgqd: Tensor, statistics_tgq2: Tensor, num_filler: int, left: int, right: int,
                       rate: float, first_head: int, instructions: str) -> Tensor:
    return _backward(grad_tgqd, qkv_tgcd, cu_seqlens, seed, context_tgqd, statistics_tgq2, num_filler, left, right,
                     rate, first_head, instructions)


@_operator.register_fake
def _(qkv_tgcd: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = qkv_tgcd[:, :, :-2].shape
    return qkv_tgcd.new_empty(shape), qkv_tgcd.new_empty((*shape[:-1], 2), dtype=torch.float32)


@_operator_backward.register_fake
def _(grad_tgqd: Tensor, qkv_tgcd: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(qkv_tgcd, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.numbers = inputs[3:]
    ctx.save_for_backward(*inputs[:3], *output)


def _go_back(ctx: Any, grad_tgqd: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return _operator_backward(grad_tgqd, *ctx.saved_tensors, *ctx.numbers), None, None, *(None for _ in ctx.numbers)


_operator.register_autograd(_go_back, setup_context=_keep)
