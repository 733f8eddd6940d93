"""On which device, and by Triton or not, a tensor is computed; how functions become operators of PyTorch."""

import os
from collections.abc import Callable, Sequence
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# Of backward passes whose programs each have partial sums: what an H100 runs at once, in warps and in programs of four.
MOST_WARPS, MOST_PROGRAMS = 16 * 132, 4 * 132
_T = TypeVar("_T")
_DTYPES = torch.float32, torch.bfloat16, torch.float16


def constant_when_compiled(function: Callable[[], bool]) -> Callable[[], bool]:
    """`function`, whose result torch.compile treats as a constant.

    Does what `torch.compiler.assume_constant_result` does without importing torch._dynamo, which is slow.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def takes_gpu_way(tensor: Tensor) -> bool:
    """Whether `tensor` is computed as on a GPU: it is on one, or is a fake tensor, which stands for one on a GPU."""
    return tensor.device.type != "cpu" or isinstance(tensor, FakeTensor)


def takes_triton(tensor: Tensor, if_compiled: bool = False) -> bool:
    """Whether Triton's kernels compute what lies between matrix products, for such a tensor.

    Fake tensors stand for a GPU's. Under torch.compile, which fuses the plain functions by itself, only with
    `if_compiled`.
    """
    if torch.compiler.is_compiling() and not if_compiled or tensor.dtype not in _DTYPES:
        return False
    return is_fake(tensor) or runs_triton(tensor)


def runs_triton(tensor: Tensor) -> bool:
    """Whether Triton is there and its kernels run on `tensor`: on GPUs since Ampere, or interpreted anywhere."""
    return (is_interpreted() or is_of_ampere(tensor)) and has_triton()


def takes_compilation(tensor: Tensor) -> bool:
    """Whether `in_one_kernel` makes one kernel for `tensor`, which Triton's interpreter does not; fake ones stand for a
    GPU's.
    """
    return is_fake(tensor) or is_of_ampere(tensor) and has_triton()


def is_of_ampere(tensor: Tensor) -> bool:
    """Whether the tensor's GPU is of that generation or a later one: compute capability 8.0."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= (8, 0)


def product_precision() -> str:
    """The precision of Triton's fp32 matrix products, "tf32" or "ieee": the one that PyTorch's own have."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def is_fake(tensor: Tensor) -> bool:
    """Whether `tensor` has a size but no values."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def operator(name: str, empty: Callable[..., Any]) -> Callable[[Callable[..., _T]], Callable[..., _T]]:
    """Makes a function the operator `megatron::name` where it has to be one: for torch.compile and on fake tensors.

    Elsewhere a call runs the function itself, for calling an operator of Python costs some 15 µs. `empty` takes the
    same arguments, and returns empty tensors like the results. One of the arguments must be a tensor; the function
    changes none of them.
    """
    def decorate(function: Callable[..., _T]) -> Callable[..., _T]:
        made = torch.library.custom_op(f"megatron::{name}", function, mutates_args=())
        made.register_fake(empty)

        @wraps(function)
        def call(*arguments: Any) -> _T:
            if torch.compiler.is_compiling() or is_fake(next(each for each in arguments if isinstance(each, Tensor))):
                return made(*arguments)
            return function(*arguments)

        return call

    return decorate


def in_one_kernel(name: str, changes: Sequence[str] = ()) -> Callable[[Callable[..., _T]], Callable[..., _T]]:
    """Makes one kernel on GPUs, by torch.compile, of a function whose operations would each go through memory there.

    Under torch.compile, on CPUs and on GPUs before Ampere the function runs as it is. On fake tensors it is the
    operator `megatron::name`, which stands for the kernel. Its first argument must be a tensor; `changes`: the
    arguments that it changes in place.
    """
    def decorate(function: Callable[..., _T]) -> Callable[..., _T]:
        made = torch.library.custom_op(f"megatron::{name}", function, mutates_args=changes)
        made.register_fake(function)

        @cache
        def compiled() -> Callable[..., _T]:
            return torch.compile(function, dynamic=True)

        @wraps(function)
        def call(first: Tensor, *others: Any) -> _T:
            if torch.compiler.is_compiling():
                return function(first, *others)
            if is_fake(first):
                return made(first, *others)
            return (compiled() if takes_compilation(first) else function)(first, *others)

        return call

    return decorate


@constant_when_compiled
def has_triton() -> bool:
    """Whether Triton is installed; asked before any of its kernels is compiled."""
    return _prepared_triton()


@constant_when_compiled
def is_interpreted() -> bool:
    """Whether Triton runs kernels in Python, as it does in tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _prepared_triton() -> bool:
    # Kernels whose products are not fused with the sums that follow are slower, and round otherwise. Triton 3.9 fuses
    # them with a warning that 3.10 will not, unless it is told.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    return find_spec("triton") is not None
