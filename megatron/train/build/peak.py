"""How fast this device multiplies matrices: what the model's FLOP/s are compared with.

Which product is fastest depends on the processor: one whose matrices stay in its caches may beat a larger one. So the
model's own are timed beside a large square, again and again: what comes from idling takes a while to reach its clock.
"""

import itertools
import time

import torch
from torch.nn.functional import linear

from megatron.config import ModelConfig

MEASURING_S = 0.6
MOST_TOKENS = 4096  # more are not faster, and take longer


def measured_peak_flops(dtype: torch.dtype, device: torch.device, num_tokens: int, model: ModelConfig) -> float:
    """FLOP/s of the fastest matrix product in `dtype`, best of what can be timed in some tenths of a second.

    Tried are the two products of the model's feed-forward layers on `num_tokens` tokens, and a large square one.
    """
    tokens, hidden, inner = min(num_tokens, MOST_TOKENS), model.hidden_size, model.ffn_hidden_size
    square = 8192 if device.type == "cuda" else 2048
    shapes = (tokens, hidden, inner), (tokens, inner, hidden), (square, square, square)
    pairs = [[torch.randn(size, width, device=device).to(dtype) for size in (rows, columns)]
             for rows, width, columns in shapes]
    linear(pairs[0][0][:64], pairs[0][1][:64])  # what a library does once is not the products' time
    began_s, best_flops = time.perf_counter(), 0.0
    for left, right in itertools.cycle(pairs):
        best_flops = max(best_flops, 2 * left.numel() * len(right) / _elapsed_s(left, right))
        if time.perf_counter() - began_s > MEASURING_S:  # at once for a dtype that this processor only emulates
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
