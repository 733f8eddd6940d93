"""Attention by the way that `--attention-backend` asks for, or an error that says why it cannot be.

auto is none of them: there `megatron.kernels.attention.packed` chooses. Shapes as there.
"""

import torch
from torch import Tensor

from megatron.errors import ConfigError
from megatron.kernels.attention.by_protein import Window, attention_by_protein
from megatron.kernels.attention.compiled import INSTRUCTION_SETS, compiled_attention, takes_helper
from megatron.kernels.attention.flex import by_flex
from megatron.kernels.attention.fused import WIDEST, fused_attention, takes_triton_attention, takes_varlen
from megatron.kernels.device import is_fake, takes_gpu_way
from megatron.kernels.dropout import Dropout
from megatron.kernels.packed_sequence import PackedSequence

WORDS = {"varlen": "PyTorch's varlen_attn", "triton": "Triton's kernels", "flex": "PyTorch's FlexAttention, compiled",
         "compiled": "compiled code", "plain": "PyTorch one protein at a time"}
_NARROWEST = 16  # of FlexAttention, whose products have no fewer columns


def asked_attention(backend: str, qkv_tgcd: Tensor, sequence: PackedSequence, dropout: Dropout | None,
                    window: Window) -> Tensor:
    """The context [t, n, d] by that way. Raises ConfigError where it does not take these."""
    if not torch.compiler.is_compiling():
        check_asked(backend, qkv_tgcd, dropout is not None, window)
    if backend == "flex" and not is_fake(qkv_tgcd):
        return by_flex(qkv_tgcd, sequence, window)
    if backend in ("varlen", "triton", "flex"):  # without values FlexAttention is what keeps as much as it does
        return fused_attention(qkv_tgcd, None, sequence, 0, dropout, window, takes_triton=backend != "varlen")
    by = compiled_attention if backend == "compiled" else attention_by_protein
    return by(qkv_tgcd, sequence.cu_seqlens, sequence.num_filler, window, dropout)


def check_asked(backend: str, qkv_tgcd: Tensor, has_dropout: bool, window: Window, is_whole: bool = True) -> None:
    """Raises ConfigError where that way does not take such tensors; `is_whole`: every protein's tokens are here."""
    if not is_whole:
        raise _refused(backend, "is for one context rank", "leave it at auto, or --context-parallel-size at 1")
    is_on_gpu, width = takes_gpu_way(qkv_tgcd), qkv_tgcd.shape[-1]
    is_of_gpus = backend in ("varlen", "triton", "flex")
    if is_of_gpus and not is_on_gpu:
        raise _refused(backend, "is for GPUs, and this is a CPU", "leave it at auto, or give compiled or plain")
    if backend == "varlen" and not takes_varlen(qkv_tgcd, qkv_tgcd.shape[2] - 2, has_dropout, window, True):
        lacking = what_varlen_lacks(qkv_tgcd, has_dropout, window, True) or "such a GPU"
        raise _refused(backend, f"takes no {lacking}", "leave it at auto, or give triton")
    if backend == "triton" and not takes_triton_attention(qkv_tgcd):
        raise _refused(backend, "takes fp32, fp16 and bf16, heads up to 256 wide, and GPUs of compute capability 8.0 "
                       "or later with Triton installed", "leave it at auto, or give plain")
    if backend == "flex" and (has_dropout or width < _NARROWEST or qkv_tgcd.dtype == torch.float64):
        lacking = "dropout" if has_dropout else f"width of {width}" if width < _NARROWEST else "float64"
        raise _refused(backend, f"takes no {lacking}", "leave it at auto, or give " + (
            "triton or --attention-dropout 0" if has_dropout else "triton"))
    if backend == "compiled" and not takes_helper(qkv_tgcd):
        why = ("is for CPUs, and this is a GPU" if is_on_gpu else "takes fp32 and bf16" if INSTRUCTION_SETS else
               "is not built: that takes a C++ compiler and pybind11")
        raise _refused(backend, why, "leave it at auto, or give plain")


def what_varlen_lacks(qkv_tgcd: Tensor, has_dropout: bool, window: Window, is_whole: bool) -> str:
    """What of these PyTorch's operator does not take, in words; empty where it is only the GPU."""
    queries, width = qkv_tgcd.shape[2] - 2, qkv_tgcd.shape[-1]
    reasons = {"dropout": has_dropout, "groups of queries": queries > 1, "fp32": qkv_tgcd.dtype == torch.float32,
               "float64": qkv_tgcd.dtype == torch.float64, "window over context ranks": window and not is_whole,
               f"width of {width}": width % 8 or width > WIDEST}
    return " and no ".join(name for name, is_so in reasons.items() if is_so)


def _refused(backend: str, why: str, remedy: str) -> ConfigError:
    return ConfigError(f"--attention-backend {backend} ({WORDS[backend]}) {why}; {remedy}")
