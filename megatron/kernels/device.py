"""Which way a kernel goes: a GPU's, a GPU's by Triton, or a CPU's."""

import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_DTYPES = torch.float32, torch.bfloat16, torch.float16


def takes_gpu_way(tensor: Tensor) -> bool:
    """Whether `tensor` is on a GPU, or is a fake one, which stands for a GPU's."""
    return tensor.device.type != "cpu" or isinstance(tensor, FakeTensor)


def takes_triton(tensor: Tensor) -> bool:
    """Whether Triton's kernels take `tensor`: on GPUs since Ampere, and where they are interpreted, anywhere.

    Fake tensors stand for a GPU's. What torch.compile compiles goes the plain way, which inductor fuses.
    """
    if torch.compiler.is_compiling() or tensor.dtype not in _DTYPES:
        return False
    if is_fake(tensor):
        return True
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    return _has_triton() and (not tensor.is_cuda or _is_ampere_or_newer(tensor.device))


def is_fake(tensor: Tensor) -> bool:
    """Whether `tensor` has a size but no values."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def as_called(operator: Callable[..., Any], function: Callable[..., Any], tensor: Tensor) -> Callable[..., Any]:
    """`operator` for fake tensors, which need one; else the `function` that it is made of: calling an operator of
    Python costs some 15 µs."""
    return operator if is_fake(tensor) else function


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _is_ampere_or_newer(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)
