"""Micro-batches of random proteins of given lengths, and stand-ins for the attention operators of GPUs."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron.data.batches.batch import Batch, BatchShape, collate
from megatron.data.rows.packed import Row
from megatron.kernels.attention import backends, fused
from megatron.kernels.dropout import Dropout, Use, is_kept


def packed_batch(*lengths: int, filler: int = 0, empty: int = 0, targets: Sequence[int] | None = None,
                 padding: int = 0, seed: int = 0, share: int = 0, num_shares: int = 1) -> Batch:
    """A micro-batch of one row: random proteins of the given lengths.

    Targets are every fifth token, or the tokens `targets`. The proteins are followed by `filler` tokens; `empty` is the
    number of additional boundaries of empty proteins, `padding` that of entries in the targets that are not targets.
    `seed`: of tokens and dropout. `share` of `num_shares`: the part for one rank of the context axis.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(6, 31, sum(lengths))
    chosen = np.arange(1, len(tokens), 5) if targets is None else np.array(targets, dtype=np.int64)
    row = Row(tokens, np.array(lengths, dtype=np.int64), chosen, rng.integers(6, 31, len(chosen)))
    return collate([row], BatchShape(len(tokens) + filler, len(lengths) + empty, len(chosen) + padding,
                                     max(lengths, default=1), share, num_shares), seed)


@contextmanager
def fused_by_definition() -> Iterator[list[tuple[str, float]]]:
    """Within this context attention calls the operators of GPUs, replaced by their definitions in PyTorch.

    Yields the list of calls: the operator's name and its dropout rate.
    """
    calls: list[tuple[str, float]] = []

    def varlen(query: Tensor, key: Tensor, value: Tensor, query_ends: Tensor, key_ends: Tensor, longest_query: int,
               longest_key: int, *, window_size: tuple[int, int]) -> Tensor:
        assert query.dtype != torch.float32
        assert window_size in ((-1, -1), (longest_key, longest_key))  # the second ends nowhere
        calls.append(("varlen", 0.0))
        for tensor, ends, longest in ((query, query_ends, longest_query), (key, key_ends, longest_key)):
            assert (ends[0], ends[-1]) == (0, len(tensor))  # tokens in no segment would get an undefined context
            assert 0 <= ends.diff().min() <= ends.diff().max() <= longest
        return _by_definition((query, key, value), (query_ends, key_ends), None)

    def triton(qkv: Tensor, key_value: Tensor | None, ends: Tensor, seed: Tensor | None, num_filler: int, first: int,
               left: int, right: int, kept: int, first_head: int) -> list[Tensor]:
        assert left == right == -1
        rate = 0.0 if seed is None else 1 - kept / 65536
        dropout = None if seed is None else Dropout(rate, seed, Use.PROBABILITIES, first, first_head)
        calls.append(("triton", round(rate, 3)))
        query, keys = (qkv[:, :, :-2], qkv[:, :, -2:]) if key_value is None else (qkv, key_value)
        key, value = (tensor.repeat_interleave(query.shape[2], 1) for tensor in keys.unbind(2))
        ends = ends[:len(ends) - num_filler]
        query_ends = (ends - first).clamp(0, len(query))
        context = _by_definition((query.flatten(1, 2), key, value), (query_ends, ends), dropout)
        context = context + 0 * keys.sum()  # an operator's result always depends on the keys
        return [F.pad(context, (0, 0, 0, 0, 0, len(query) - len(context))).view_as(query)]

    with (patch.object(backends, "takes_gpu_way", lambda _: True),
          patch.object(backends, "is_of_ampere", lambda _: True), patch.object(backends, "runs_triton", lambda _: True),
          patch("torch.nn.attention.varlen.varlen_attn", varlen), patch.object(fused, "_operator", triton)):
        yield calls


def _by_definition(tensors: tuple[Tensor, Tensor, Tensor], ends: tuple[Tensor, Tensor],
                   dropout: Dropout | None) -> Tensor:
    """The context of queries, keys and values, one segment at a time; `ends`: the boundaries of queries and of keys."""
    assert all(each.dtype == torch.int32 and each.is_contiguous() for each in ends)
    queries, keys = ([slice(*span) for span in itertools.pairwise(each.tolist())] for each in ends)
    query, key, value = (tensor.transpose(0, 1) for tensor in tensors)
    contexts = []
    for mine, whole in zip(queries, keys, strict=True):
        weights = (query[:, mine].float() @ key[:, whole].float().mT * query.shape[-1] ** -0.5).softmax(-1)
        if dropout is not None:
            here = dropout.from_row(dropout.first_row + mine.start)
            weights = weights * is_kept(here, weights.shape[1], range(whole.start, whole.stop), len(weights))
            weights = weights * dropout.growth
        contexts.append((weights @ value[:, whole].float()).to(query.dtype))
    return torch.cat([query[:, :0], *contexts], dim=1).transpose(0, 1)
