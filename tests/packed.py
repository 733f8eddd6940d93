"""What tests of the model run on: a micro-batch of proteins of given lengths, and a stand-in for GPUs' operators."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron.data.batches.batch import Batch, BatchShape, collate
from megatron.data.rows.packed import Row
from megatron.kernels import attention
from megatron.parallel import context


def packed_batch(*lengths: int, filler: int = 0, empty: int = 0, targets: Sequence[int] | None = None,
                 padding: int = 0, seed: int = 0, share: int = 0, num_shares: int = 1) -> Batch:
    """Random proteins with targets at every fifth token or at `targets`.

    `filler` tokens lie behind them, the boundaries of `empty` more proteins, and `padding` that is no target.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(6, 31, sum(lengths))
    chosen = np.arange(1, len(tokens), 5) if targets is None else np.array(targets, dtype=np.int64)
    row = Row(tokens, np.array(lengths, dtype=np.int64), chosen, rng.integers(6, 31, len(chosen)))
    return collate([row], BatchShape(len(tokens) + filler, len(lengths) + empty, len(chosen) + padding,
                                     max(lengths, default=1), share, num_shares))


@contextmanager
def fused_by_definition() -> Iterator[list[tuple[str, float]]]:
    """Lets attention take the operators of GPUs, which have no kernels on CPUs; lists their names and dropout."""
    calls: list[tuple[str, float]] = []

    def flash(query: Tensor, key: Tensor, value: Tensor, query_ends: Tensor, key_ends: Tensor, longest_query: int,
              longest_key: int, dropout: float, is_causal: bool, returns_mask: bool, *, window_size_left: int | None,
              window_size_right: int | None) -> list[Tensor]:
        assert query.dtype != torch.float32 and not is_causal and not returns_mask
        assert window_size_left is window_size_right is None
        calls.append(("flash", dropout))
        return [_by_definition((query, key, value), (query_ends, key_ends), (longest_query, longest_key), dropout)]

    def efficient(query: Tensor, key: Tensor, value: Tensor, bias: None, query_ends: Tensor, key_ends: Tensor,
                  longest_query: int, longest_key: int, dropout: float, mask_type: int, goes_back: bool) -> Any:
        assert bias is None and mask_type == 0 and goes_back == (torch.is_grad_enabled() and query.requires_grad)
        assert all(len(tensor) == 1 for tensor in (query, key, value))
        calls.append(("memory-efficient", dropout))
        return [_by_definition((query[0], key[0], value[0]), (query_ends, key_ends), (longest_query, longest_key),
                               dropout)[None]]

    with (patch.object(attention, "is_fused", lambda *_, **__: True),
          patch.object(context, "is_fused", lambda *_, **__: True),
          patch.object(attention, "_takes_flash", lambda tensor: tensor.dtype != torch.float32),
          patch.object(torch.ops.aten, "_flash_attention_forward", flash),
          patch.object(torch.ops.aten, "_efficient_attention_forward", efficient)):
        yield calls


def _by_definition(tensors: tuple[Tensor, Tensor, Tensor], ends: tuple[Tensor, Tensor], longest: tuple[int, int],
                   dropout: float) -> Tensor:
    """Each segment for itself; an empty one has no context, and what has no keys is none of the operators' business."""
    spans = []
    for tensor, each, most in zip(tensors, ends, longest, strict=False):
        assert each.dtype == torch.int32 and each.is_contiguous() and (each[0], each[-1]) == (0, len(tensor))
        assert 0 <= each.diff().min() <= each.diff().max() <= most
        spans.append([slice(*span) for span in itertools.pairwise(each.tolist())])
    query, key, value = (tensor.transpose(0, 1) for tensor in tensors)
    contexts = [F.scaled_dot_product_attention(query[:, mine], key[:, whole], value[:, whole], dropout_p=dropout)
                for mine, whole in zip(*spans, strict=True) if mine.stop > mine.start]
    return torch.cat(contexts, dim=1).transpose(0, 1)
