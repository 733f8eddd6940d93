"""Which attention runs: one table of back-ends, and the choice between them.

All who need to know ask `choose` here and go by the name that it returns, one of those of `--attention-backend`: what
computes attention (`packed`, `megatron.parallel.context`), its maps, the checks of other flags, and the line at the
start of a run.

Shapes: u tokens on this context rank, n heads in g groups of q, d head width; for each group c = q + 2 rows: its
queries, its key, its value. `is_whole`: all tokens of every protein are on this rank.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import current_flash_attention_impl

from megatron.errors import ConfigError
from megatron.kernels.attention import native
from megatron.kernels.attention.by_protein import Window, attention_by_protein
from megatron.kernels.attention.flex import by_flex
from megatron.kernels.attention.fused import by_triton, by_varlen
from megatron.kernels.attention.native import native_attention
from megatron.kernels.device import has_triton, is_fake, is_of_ampere, runs_triton, takes_gpu_way
from megatron.kernels.dropout import Dropout
from megatron.kernels.packed_sequence import PackedSequence

_WIDEST, _NARROWEST_FLEX = 256, 16  # heads; FlexAttention's products have no fewer columns
_HALF = (torch.float16, torch.bfloat16)
_FOR_GPUS, _FOR_CPUS = "is for GPUs, and this is a CPU", "is for CPUs, and this is a GPU"


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    `words`: its name in messages. `why_not` takes qkv [u, g, c, d], whether there is dropout, the window and `is_whole`
    and returns why it cannot compute attention of these, worded to follow its name ("takes no dropout"), or None if it
    can. `run` takes qkv, the sequence, dropout and the window, and returns the context [u, n, d].
    """

    words: str
    why_not: Callable[[Tensor, bool, Window, bool], str | None]
    run: Callable[..., Tensor]


def choose(qkv_ugcd: Tensor, has_dropout: bool, window: Window, is_whole: bool = True, backend: str = "auto") -> str:
    """The name of the back-end that computes attention: `backend`, or where that is auto the fastest that can.

    `backend` is what `--attention-backend` gives. Raises ConfigError where it cannot, or where a GPU lacks nothing but
    Triton.
    """
    if backend != "auto":
        if not torch.compiler.is_compiling():  # a run has checked it at its start
            _check_asked(backend, qkv_ugcd, has_dropout, window, is_whole)
        return backend
    is_on_gpu = takes_gpu_way(qkv_ugcd)
    for name in ("varlen", "triton") if is_on_gpu else ("compiled",):
        if BACKENDS[name].why_not(qkv_ugcd, has_dropout, window, is_whole) is None:
            return name
    if is_on_gpu and _fits_triton(qkv_ugcd) and is_of_ampere(qkv_ugcd) and not has_triton():
        raise ConfigError("attention with dropout, in fp32, with groups of queries or of a width that is no multiple "
                          "of 8 needs Triton on a GPU, and it is not installed: install it (pip install triton), or "
                          "train with --bf16 --attention-dropout 0")
    return "plain"


def in_words(name: str, is_asked: bool, qkv_ugcd: Tensor, has_dropout: bool, window: Window, is_whole: bool) -> str:
    """What `choose` has chosen, for people, and why it is nothing faster; `is_asked`: by `--attention-backend`."""
    why = "as --attention-backend says"
    if not is_asked and name == "varlen":
        why = current_flash_attention_impl() or "FA2"
    elif not is_asked and name == "triton":
        why = f"varlen_attn {_why_not_varlen(qkv_ugcd, has_dropout, window, is_whole)}"
    elif not is_asked and name == "compiled":
        why = native.INSTRUCTION_SETS[0]
    elif not is_asked and takes_gpu_way(qkv_ugcd):
        return f"{BACKENDS[name].words}, which is slow (no kernel takes this GPU, dtype and width)"
    elif not is_asked:
        why = f"the C++ helper {_why_not_native(qkv_ugcd)}"
    return f"{BACKENDS[name].words} ({why})"


def _check_asked(name: str, qkv_ugcd: Tensor, has_dropout: bool, window: Window, is_whole: bool) -> None:
    case = qkv_ugcd, has_dropout, window, is_whole
    why = BACKENDS[name].why_not(*case) if is_whole else "is for one context rank"
    if why is None:
        return
    others = [each for each, backend in BACKENDS.items() if backend.why_not(*case) is None]
    remedy = f"give {' or '.join(others)}" if is_whole else "--context-parallel-size at 1"
    raise ConfigError(f"--attention-backend {name} ({BACKENDS[name].words}) {why}; leave it at auto, or {remedy}")


def _why_not_varlen(qkv_ugcd: Tensor, has_dropout: bool, window: Window, is_whole: bool) -> str | None:
    if not takes_gpu_way(qkv_ugcd):
        return _FOR_GPUS
    dtype, width = qkv_ugcd.dtype, qkv_ugcd.shape[-1]
    reasons = {"dropout": has_dropout, "groups of queries": qkv_ugcd.shape[2] > 3, "fp32": dtype == torch.float32,
               "float64": dtype == torch.float64,
               "window over context ranks": window is not None and not is_whole,  # it counts from proteins' ends
               f"width of {width}": width % 8 or width > _WIDEST,
               "such a GPU": not (is_fake(qkv_ugcd) or is_of_ampere(qkv_ugcd))}
    lacking = [name for name, is_so in reasons.items() if is_so]
    return "takes no " + " and no ".join(lacking) if lacking else None


def _why_not_triton(qkv_ugcd: Tensor, *_: object) -> str | None:
    if not takes_gpu_way(qkv_ugcd):
        return _FOR_GPUS
    if _fits_triton(qkv_ugcd) and (is_fake(qkv_ugcd) or runs_triton(qkv_ugcd)):
        return None
    return ("takes fp32, fp16 and bf16, heads up to 256 wide, and GPUs of compute capability 8.0 or later with Triton "
            "installed")


def _fits_triton(qkv_ugcd: Tensor) -> bool:
    return qkv_ugcd.shape[-1] <= _WIDEST and qkv_ugcd.dtype in (*_HALF, torch.float32)


def _why_not_flex(qkv_ugcd: Tensor, has_dropout: bool, *_: object) -> str | None:
    if not takes_gpu_way(qkv_ugcd):
        return _FOR_GPUS
    if has_dropout:
        return "takes no dropout"
    if qkv_ugcd.shape[-1] < _NARROWEST_FLEX:
        return f"takes no width of {qkv_ugcd.shape[-1]}"
    return "takes no float64" if qkv_ugcd.dtype == torch.float64 else None


def _why_not_native(qkv_ugcd: Tensor, *_: object) -> str | None:
    if takes_gpu_way(qkv_ugcd):
        return _FOR_CPUS
    if not native.INSTRUCTION_SETS:
        return "is not built: that takes a C++ compiler and pybind11"
    return None if qkv_ugcd.dtype in (torch.float32, torch.bfloat16) else "takes fp32 and bf16"


def _run_flex(qkv_tgcd: Tensor, sequence: PackedSequence, dropout: Dropout | None, window: Window) -> Tensor:
    if is_fake(qkv_tgcd):  # which FlexAttention does not take: this keeps as much for the backward pass
        return by_triton(qkv_tgcd, sequence, dropout, window)
    return by_flex(qkv_tgcd, sequence, window)


# By the values of `--attention-backend`, as which the C++ helper is `compiled`.
BACKENDS = {
    "varlen": Backend("PyTorch's varlen_attn", _why_not_varlen, by_varlen),
    "triton": Backend("Triton's kernels", _why_not_triton, by_triton),
    "flex": Backend("PyTorch's FlexAttention, compiled", _why_not_flex, _run_flex),  # only where it is asked for
    "compiled": Backend("the C++ helper", _why_not_native, native_attention),
    "plain": Backend("PyTorch one protein at a time", lambda *_: None, attention_by_protein),
}
