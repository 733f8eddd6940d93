"""Attention by PyTorch's FlexAttention under a mask of proteins (Dong et al., 2024, arXiv 2412.05496), on GPUs.

Beside the ways that are chosen by themselves, for who wants a kernel that PyTorch generates and keeps up with its GPUs.
What a block of queries sees is a run of keys, so that the mask of blocks follows from the boundaries on the device: it
has one shape whatever proteins there are, no t × t tensor is ever made, and the host waits for nothing. Filler sees
nothing, is not seen, and costs next to nothing. Compiled, as here, it takes fp32, bf16 and fp16, groups of queries and
windows, but no dropout; PyTorch has no backward pass of it on CPUs. Shapes as in `packed`; e blocks of tokens.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron.kernels.attention.by_protein import Window
from megatron.kernels.packed_sequence import PackedSequence, proteins_of_tokens

_BLOCK = 128  # tokens


def by_flex(qkv_tgcd: Tensor, sequence: PackedSequence, window: Window = None) -> Tensor:
    """The context [t, n, d], 0 in the filler; by the sequence's own mask where `with_masks` has made it."""
    mask = block_mask(sequence, len(qkv_tgcd), window) if sequence.masks is None else sequence.masks[window]
    num_queries, width = qkv_tgcd.shape[2] - 2, qkv_tgcd.shape[3]
    query, key, value = (rows.transpose(0, 1)[None] for rows in (
        qkv_tgcd[:, :, :-2].flatten(1, 2), qkv_tgcd[:, :, -2], qkv_tgcd[:, :, -1]))
    attend = flex_attention if torch.compiler.is_compiling() else _compiled()
    context = attend(query, key, value, block_mask=mask, scale=width**-0.5, enable_gqa=num_queries > 1)
    return context[0].transpose(0, 1)


def with_masks(sequence: PackedSequence, windows: Iterable[Window]) -> PackedSequence:
    """The same with the mask of each window: made once a micro-batch, for all blocks of the model."""
    num_tokens = len(sequence.tokens_t)
    return replace(sequence, masks={window: block_mask(sequence, num_tokens, window) for window in windows})


def block_mask(sequence: PackedSequence, num_tokens: int, window: Window) -> BlockMask:
    """Which blocks of keys each block of queries sees in part, and which wholly."""
    ends = sequence.cu_seqlens
    num_proteins = len(ends) - 1 - sequence.num_filler
    protein_t = proteins_of_tokens(ends, 0, num_tokens)
    is_real_t = protein_t < num_proteins
    left, right = window or (num_tokens, num_tokens)

    def sees(_row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_near = (query - key <= left) & (key - query <= right)
        return (protein_t[query] == protein_t[key]) & is_real_t[query] & is_near

    place_t = torch.arange(num_tokens, device=ends.device)
    first_t = torch.maximum(ends[protein_t].long(), place_t - left).where(is_real_t, num_tokens)
    stop_t = torch.minimum(ends[protein_t + 1].long(), place_t + right + 1).where(is_real_t, 0)
    first_e, stop_e = _of_blocks(first_t, num_tokens).amin(1), _of_blocks(stop_t, 0).amax(1)
    # A block of keys is seen wholly where both blocks lie in one protein, and their furthest tokens in the window.
    protein_ex = _of_blocks(protein_t.where(is_real_t, -1), -1)
    one_e = protein_ex[:, 0].where((protein_ex == protein_ex[:, :1]).all(1) & (protein_ex[:, 0] >= 0), -1)
    block_e = torch.arange(len(first_e), device=ends.device)
    start_e = block_e * _BLOCK
    is_seen_ee = (start_e + _BLOCK > first_e[:, None]) & (start_e < stop_e[:, None])
    apart_ee = start_e - start_e[:, None]
    is_whole_ee = (one_e[:, None] == one_e) & (one_e >= 0) & (apart_ee + _BLOCK - 1 <= right) & (
        _BLOCK - 1 - apart_ee <= left)
    partly, wholly = _listed(is_seen_ee & ~is_whole_ee), _listed(is_whole_ee)
    return BlockMask.from_kv_blocks(*partly, *wholly, BLOCK_SIZE=_BLOCK, mask_mod=sees,
                                    seq_lengths=(num_tokens, num_tokens))


def _of_blocks(values_t: Tensor, fill: int) -> Tensor:
    """[e, tokens of a block]."""
    return F.pad(values_t, (0, -len(values_t) % _BLOCK), value=fill).view(-1, _BLOCK)


def _listed(is_seen_ee: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries sees, and their numbers, before those that it does not see."""
    order_ee = is_seen_ee.int().argsort(dim=1, descending=True, stable=True)
    return is_seen_ee.sum(1, dtype=torch.int32)[None, None], order_ee.int()[None, None]


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)
