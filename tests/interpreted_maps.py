"""Checks of the Triton kernel for attention maps, interpreted on CPU tensors; `tests.interpreted` runs them."""

from functools import partial

import torch

from megatron.kernels.attention.fused import context_and_logsumexp
from megatron.kernels.attention.maps import maps_by_softmax, maps_by_triton
from megatron.kernels.attention.packed import attention_reference
from tests.interpreted_cross_entropy import approximate
from tests.packed import packed_batch

_LENGTHS = 70, 1, 33, 2


def check_maps(queries: int, width: int, dtype: torch.dtype, window: tuple[int, int] | None) -> None:
    """Each protein's map agrees with maps_by_softmax, and the context with the definition in fp64.

    The map follows from the log-sum-exps that come with the context. The filler is NaN.
    """
    sequence = packed_batch(*_LENGTHS, filler=9, empty=2).to(torch.get_default_device()).sequence
    num_real = sum(_LENGTHS)
    qkv = torch.randn(len(sequence.tokens_t), 2, queries + 2, width).to(dtype)
    qkv[num_real:] = torch.nan
    context, logsumexp = context_and_logsumexp(qkv, sequence, window)
    exact_context = attention_reference(qkv[:num_real].double(), sequence, None, window)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-3
    assert (context[:num_real].double() - exact_context).abs().max() <= tolerance * 10 * approximate()
    found = list(maps_by_triton(qkv, logsumexp, _LENGTHS, window))
    exact = list(maps_by_softmax(qkv, _LENGTHS, window))
    assert [each.shape for each in found] == [(2 * queries, length, length) for length in _LENGTHS]
    for ours, true in zip(found, exact, strict=True):
        error = (ours - true).abs().max()
        assert ours.dtype == torch.float32 and error <= 3e-6 * approximate(), f"off by {error:.1e}"


CHECKS = {f"maps of {queries} queries a group, width {width}, {dtype}, window {window}":
          partial(check_maps, queries, width, dtype, window)
          for queries, width, dtype, window in [
              (1, 16, torch.float32, None), (3, 20, torch.float32, (5, 3)), (1, 72, torch.float32, None),
              (2, 24, torch.float16, None), (1, 8, torch.float16, (0, 0)), (1, 64, torch.float32, (300, 2))]}
