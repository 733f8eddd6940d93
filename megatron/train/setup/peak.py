"""Measures how fast this device multiplies matrices: the peak that the model's FLOP/s are compared with.

Which product is fastest depends on the processor: one whose matrices fit its caches may beat a larger one. So the
model's own products are timed as well as a large square, repeatedly, since an idle processor needs time to clock up.
"""

import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from torch.nn.functional import linear

from megatron.config import ModelConfig

MEASURING_S = 0.6
MOST_TOKENS = 4096  # more only take longer to measure
SHORT = 256  # the largest size in a short product, which takes less than a millisecond

Shape = tuple[int, ...]  # of a product: the rows of the left factor, the width of both, and the rows of the right one


def measured_peak_flops(dtype: torch.dtype, device: torch.device, num_tokens: int, model: ModelConfig) -> float:
    """FLOP/s of the fastest matrix product in `dtype` found within `MEASURING_S` seconds.

    It times the two products of the model's feed-forward layers on `num_tokens` tokens, and a large square one.
    """
    return _peaks((dtype,), device, _shapes(device, num_tokens, model))[0]


def gain_of_bf16(device: torch.device, num_tokens: int, model: ModelConfig) -> float:
    """How many times as fast the fastest matrix product is in bf16 as in fp32, from `MEASURING_S` seconds in all.

    On CPUs one thread measures, on short products: beside other work some of many short samples remain uninterrupted,
    where several threads would seldom all run at once.
    """
    shapes = _shapes(device, num_tokens, model)
    if device.type != "cpu":
        return _gain(device, shapes)
    short: list[Shape] = [tuple(min(size, SHORT) for size in shape) for shape in shapes]
    # In a process of its own: PyTorch's number of threads, once set, may change MKL's sums for good.
    with ProcessPoolExecutor(1, get_context("fork"), torch.set_num_threads, (1,)) as alone:
        return alone.submit(_gain, device, short).result()


def _gain(device: torch.device, shapes: Sequence[Shape]) -> float:
    fp32, bf16 = _peaks((torch.float32, torch.bfloat16), device, shapes)
    return bf16 / fp32


def _shapes(device: torch.device, num_tokens: int, model: ModelConfig) -> list[Shape]:
    """The products to time: the two of the model's feed-forward layers, and a large square one."""
    tokens, hidden, inner = min(num_tokens, MOST_TOKENS), model.hidden_size, model.ffn_hidden_size
    square = 8192 if device.type == "cuda" else 2048
    return [(tokens, hidden, inner), (tokens, inner, hidden), (square, square, square)]


def _peaks(dtypes: Sequence[torch.dtype], device: torch.device, shapes: Sequence[Shape]) -> list[float]:
    """FLOP/s of the fastest product in each dtype; the dtypes take turns, for `MEASURING_S` seconds in all."""
    pairs = [[tuple(torch.randn(size, width, device=device).to(dtype) for size in (rows, columns)) for dtype in dtypes]
             for rows, width, columns in shapes]
    for left, right in pairs[0]:
        linear(left[:64], right[:64])  # the library initialises itself outside the timing
    began_s, best_flops = time.perf_counter(), [0.0 for _ in dtypes]
    for of_shape in itertools.cycle(pairs):
        best_flops = [max(best, 2 * left.numel() * len(right) / _elapsed_s(left, right))
                      for best, (left, right) in zip(best_flops, of_shape, strict=True)]
        if time.perf_counter() - began_s > MEASURING_S:  # after one product in a dtype that is only emulated
            return best_flops
    raise AssertionError("a cycle does not end")


def _elapsed_s(left: torch.Tensor, right: torch.Tensor) -> float:
    _wait(left.device)
    began_s = time.perf_counter()
    linear(left, right)
    _wait(left.device)
    return time.perf_counter() - began_s


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
