"""How fast this device multiplies matrices: what the model's FLOP/s are compared with."""

import time

import torch


def measured_peak_flops(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large square matrix product in `dtype`: the best of a few runs, some tenths of a second in all."""
    size = 8192 if device.type == "cuda" else 1024
    left = torch.randn(size, size, device=device).to(dtype)
    best_s = float("inf")
    for _ in range(5):
        _wait(device)
        began_s = time.perf_counter()
        left @ left
        _wait(device)
        best_s = min(best_s, time.perf_counter() - began_s)
        if best_s > 0.5:  # a dtype that this processor only emulates
            break
    return 2 * size**3 / best_s


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
