"""Which way a kernel goes: a GPU's, or a CPU's."""

from importlib.util import find_spec

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def takes_gpu_way(tensor: Tensor) -> bool:
    """Whether `tensor` is on a GPU, or is a fake one, which stands for a GPU's."""
    return tensor.device.type != "cpu" or isinstance(tensor, FakeTensor)


def takes_triton(tensor: Tensor) -> bool:
    """Whether Triton is there and its kernels run on `tensor`: on GPUs from Ampere on, or interpreted anywhere."""
    if not has_triton():
        return False
    if is_interpreted():
        return True
    return tensor.device.type == "cuda" and torch.cuda.get_device_capability(tensor.device) >= (8, 0)


@torch.compiler.assume_constant_result
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


@torch.compiler.assume_constant_result
def is_interpreted() -> bool:
    """Whether Triton, which is there, runs kernels in Python, as TRITON_INTERPRET=1 asks: for tests."""
    import triton

    return bool(triton.knobs.runtime.interpret)
