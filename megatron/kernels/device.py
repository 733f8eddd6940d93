"""Which way a kernel goes: a GPU's, or a CPU's."""

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def takes_gpu_way(tensor: Tensor) -> bool:
    """Whether `tensor` is on a GPU, or is a fake one, which stands for a GPU's."""
    return tensor.device.type != "cpu" or isinstance(tensor, FakeTensor)
