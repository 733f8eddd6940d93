"""Attention of all proteins at once on GPUs: one operator, by boundaries on the device.

Two do it. PyTorch's `varlen_attn`, which is FlashAttention 2, in half precision, without dropout, with a key for each
query head. Everything else is Triton's kernels (`megatron.kernels.attention.triton_kernels`): dropout, fp32 (with TF32
products where `torch.backends.cuda.matmul` has them), any width up to 256, groups of queries, windows also where the
queries are a context rank's; they take nothing of the filler, read the fused projection as it lies and write its
gradient as one tensor. Fake tensors stand for those of a GPU that has both.

Shapes: u tokens with queries, t tokens with keys and values, n heads in g groups of q, d head width, x = q rows of a
group where keys and values come as a tensor of their own, and c = q + 2 where they lie behind the queries.
"""

from typing import Any

import torch
from torch import Tensor

from megatron.kernels.attention.by_protein import Window
from megatron.kernels.attention.launches import Call
from megatron.kernels.dropout import Dropout
from megatron.kernels.packed_sequence import PackedSequence

# From torch 2.14 on varlen_attn takes cuDNN on Hopper and Blackwell where there is no window, and asks nobody; others
# found it to be four times slower (pytorch/pytorch#187770).
_TAKES_CUDNN = torch.__version__ >= "2.14.0a0"


def by_varlen(qkv_ugxd: Tensor, sequence: PackedSequence, dropout: None, window: Window,
              key_value_tg2d: Tensor | None = None, first: int = 0) -> Tensor:
    """The context [u, n, d] by PyTorch's operator, of queries that begin with token `first`.

    `key_value_tg2d`: all keys and values, where they do not lie behind the queries.
    """
    assert dropout is None, "varlen_attn has no dropout"
    if key_value_tg2d is None:
        return varlen_attention(_apart(qkv_ugxd), sequence, first, window)
    return varlen_attention((qkv_ugxd.flatten(1, 2), *_apart(key_value_tg2d)), sequence, first, window)


def by_triton(qkv_ugxd: Tensor, sequence: PackedSequence, dropout: Dropout | None, window: Window,
              key_value_tg2d: Tensor | None = None, first: int = 0) -> Tensor:
    """The same by Triton's kernels."""
    left, right = window or (-1, -1)
    seed, kept, first_head = (dropout.seed, dropout.kept, dropout.first_head) if dropout else (None, 0, 0)
    return _operator(qkv_ugxd, key_value_tg2d, sequence.cu_seqlens, seed, sequence.num_filler, first, left, right,
                     kept, first_head)[0].flatten(1, 2)


def varlen_attention(parts: tuple[Tensor, ...], sequence: PackedSequence, first: int = 0,
                     window: Window = None) -> Tensor:
    """The context [u, n, d] by PyTorch's operator; `parts`: queries [u, n, d], from token `first` on, keys and values.

    Filler passes for proteins: what lies in no segment would have any context.
    """
    from torch.nn.attention.varlen import varlen_attn  # imports torch._dynamo: as slow as importing torch

    query_und, key_tgd, value_tgd = parts
    num_queries, ends, longest = len(query_und), sequence.cu_seqlens, sequence.max_length
    query_ends = ends if num_queries == len(key_tgd) else (ends - first).clamp(0, num_queries)
    if window is None and _TAKES_CUDNN:
        window = longest, longest  # FlashAttention takes one that ends nowhere for none
    context_und = varlen_attn(query_und, key_tgd, value_tgd, query_ends, ends, min(longest, num_queries), longest,
                              window_size=window or (-1, -1))
    assert isinstance(context_und, Tensor)
    return context_und


def context_and_logsumexp(qkv_tgcd: Tensor, sequence: PackedSequence, window: Window = None) -> tuple[Tensor, Tensor]:
    """By Triton's kernels, without dropout: the context [t, n, d], and the base-2 logarithm of each softmax's sum
    [n, t]."""
    left, right = window or (-1, -1)
    context_tgqd, logsumexp_nt = _operator(qkv_tgcd, None, sequence.cu_seqlens, None, sequence.num_filler, 0, left,
                                           right, 0, 0)
    return context_tgqd.flatten(1, 2), logsumexp_nt


def _apart(rows_tgrd: Tensor) -> tuple[Tensor, ...]:
    """The rows of each group apart, r tensors [t, g, d]."""
    return rows_tgrd.unbind(2) if torch.compiler.is_compiling() else _Apart.apply(rows_tgrd)


class _Apart(torch.autograd.Function):
    """`unbind(2)`, whose backward pass puts the gradients together by one copy; PyTorch's takes one each, and a sum."""

    @staticmethod
    def forward(ctx: Any, rows_tgrd: Tensor) -> tuple[Tensor, ...]:
        return rows_tgrd.unbind(2)

    @staticmethod
    def backward(ctx: Any, *grads_tgd: Tensor) -> Tensor:
        return torch.stack(grads_tgd, 2)


@torch.library.custom_op("megatron::fused_attention", mutates_args=())
def _operator(qkv_ugxd: Tensor, key_value_tg2d: Tensor | None, cu_seqlens: Tensor, seed: Tensor | None,
              num_filler: int, first: int, left: int, right: int, kept: int,
              first_head: int) -> tuple[Tensor, Tensor]:
    """The context [u, g, q, d] and of each query the logarithm of its softmax's sum [n, u]; a window of -1 is none."""
    call = Call(qkv_ugxd, key_value_tg2d, cu_seqlens, seed, num_filler, first, left, right, kept, first_head)
    results = _empty_results(qkv_ugxd, key_value_tg2d)
    call.forward(*results).run()
    return results


@torch.library.custom_op("megatron::fused_attention_backward", mutates_args=())
def _operator_backward(grad_ugqd: Tensor, qkv_ugxd: Tensor, key_value_tg2d: Tensor | None, cu_seqlens: Tensor,
                       seed: Tensor | None, context_ugqd: Tensor, logsumexp_nu: Tensor, num_filler: int, first: int,
                       left: int, right: int, kept: int, first_head: int) -> tuple[Tensor, Tensor]:
    """Gradients of the first two arguments; where there is no second, an empty one."""
    call = Call(qkv_ugxd, key_value_tg2d, cu_seqlens, seed, num_filler, first, left, right, kept, first_head)
    gradients = _empty_gradients(qkv_ugxd, key_value_tg2d)
    results = grad_ugqd.contiguous(), context_ugqd, logsumexp_nu, torch.empty_like(logsumexp_nu)
    for launch in call.backward(*results, gradients):
        launch.run()
    return gradients


def _empty_results(qkv_ugxd: Tensor, key_value_tg2d: Tensor | None) -> tuple[Tensor, Tensor]:
    tokens, groups, rows, width = qkv_ugxd.shape
    queries = rows if key_value_tg2d is not None else rows - 2
    return (qkv_ugxd.new_empty(tokens, groups, queries, width),
            qkv_ugxd.new_empty(groups * queries, tokens, dtype=torch.float32))


def _empty_gradients(qkv_ugxd: Tensor, key_value_tg2d: Tensor | None) -> tuple[Tensor, Tensor]:
    return (torch.empty_like(qkv_ugxd, memory_format=torch.contiguous_format),
            qkv_ugxd.new_empty(0) if key_value_tg2d is None else
            torch.empty_like(key_value_tg2d, memory_format=torch.contiguous_format))


@_operator.register_fake
def _(qkv_ugxd: Tensor, key_value_tg2d: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_results(qkv_ugxd, key_value_tg2d)


@_operator_backward.register_fake
def _(grad_ugqd: Tensor, qkv_ugxd: Tensor, key_value_tg2d: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_gradients(qkv_ugxd, key_value_tg2d)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.numbers = inputs[4:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _go_back(ctx: Any, grad_ugqd: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    kept = ctx.saved_tensors  # recomputation lets it be asked for once
    gradient, grad_key_value = _operator_backward(grad_ugqd, *kept, *ctx.numbers)
    return gradient, None if kept[1] is None else grad_key_value, *[None] * 8


_operator.register_autograd(_go_back, setup_context=_keep)
