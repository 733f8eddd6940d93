"""Measures how fast this device multiplies matrices: the peak that the model's FLOP/s are compared with.

Which product is fastest depends on the processor: one whose matrices fit its caches may beat a larger one. So the
model's own products are timed as well as a large square, repeatedly, since an idle processor needs time to clock up.
"""

import itertools
import time

import torch
from torch.nn.functional import linear

from megatron.config import ModelConfig

MEASURING_S = 0.6
MOST_TOKENS = 4096  # more only take longer to measure


def measured_peak_flops(dtype: torch.dtype, device: torch.device, num_tokens: int, model: ModelConfig) -> float:
    """FLOP/s of the fastest matrix product in `dtype` found within `MEASURING_S` seconds.

    It times the two products of the model's feed-forward layers on `num_tokens` tokens, and a large square one.
    """
    tokens, hidden, inner = min(num_tokens, MOST_TOKENS), model.hidden_size, model.ffn_hidden_size
    square = 8192 if device.type == "cuda" else 2048
    shapes = (tokens, hidden, inner), (tokens, inner, hidden), (square, square, square)
    pairs = [[torch.randn(size, width, device=device).to(dtype) for size in (rows, columns)]
             for rows, width, columns in shapes]
    linear(pairs[0][0][:64], pairs[0][1][:64])  # the library initialises itself outside the timing
    began_s, best_flops = time.perf_counter(), 0.0
    for left, right in itertools.cycle(pairs):
        best_flops = max(best_flops, 2 * left.numel() * len(right) / _elapsed_s(left, right))
        if time.perf_counter() - began_s > MEASURING_S:  # after one product in a dtype that is only emulated
            break
    return best_flops


def _elapsed_s(left: torch.Tensor, right: torch.Tensor) -> float:
    _wait(left.device)
    began_s = time.perf_counter()
    linear(left, right)
    _wait(left.device)
    return time.perf_counter() - began_s


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
