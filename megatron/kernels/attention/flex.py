"""Attention inside packed proteins by PyTorch's FlexAttention (Dong et al., 2024, arXiv 2412.05496), on GPUs.

It is never chosen automatically; it is for those who want a kernel that PyTorch generates and maintains for new GPUs.
Each block of queries sees a contiguous range of keys, so the block mask can be computed from the protein boundaries on
the device: its shape does not depend on the proteins, no t × t tensor is ever made, and the host does not wait. Filler
neither attends nor is attended to, and costs next to nothing. Compiled, as here, FlexAttention supports fp32, bf16,
fp16, grouped queries and windows, but no dropout; PyTorch has no backward pass for it on CPUs.
Shapes: t tokens, n heads in g groups of c rows (queries, key, value) of width d; e blocks of tokens.
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
    """The context [t, n, d], 0 in the filler; uses the sequence's masks if `with_masks` has made them."""
    mask = block_mask(sequence, len(qkv_tgcd), window) if sequence.masks is None else sequence.masks[window]
    num_queries, width = qkv_tgcd.shape[2] - 2, qkv_tgcd.shape[3]
    query, key, value = (rows.transpose(0, 1)[None] for rows in (
        qkv_tgcd[:, :, :-2].flatten(1, 2), qkv_tgcd[:, :, -2], qkv_tgcd[:, :, -1]))
    attend = flex_attention if torch.compiler.is_compiling() else _compiled()
    context = attend(query, key, value, block_mask=mask, scale=width**-0.5, enable_gqa=num_queries > 1)
    return context[0].transpose(0, 1)


def with_masks(sequence: PackedSequence, windows: Iterable[Window]) -> PackedSequence:
    """The sequence with a block mask for each window, made once per micro-batch for all layers of the model."""
    num_tokens = len(sequence.tokens_t)
    return replace(sequence, masks={window: block_mask(sequence, num_tokens, window) for window in windows})


def block_mask(sequence: PackedSequence, num_tokens: int, window: Window) -> BlockMask:
    """The mask that says which blocks of keys each block of queries sees partly, and which fully.

    `window`: how many tokens before and after itself a query sees; None: all of its protein.
    """
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
    # A block of keys is seen fully if both blocks lie in one protein and their furthest tokens within the window.
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
    """The values by block, [e, tokens of a block]; `fill` behind the last token."""
    return F.pad(values_t, (0, -len(values_t) % _BLOCK), value=fill).view(-1, _BLOCK)


def _listed(is_seen_ee: Tensor) -> tuple[Tensor, Tensor]:
    """The number of key blocks that each query block sees [1, 1, e], and all key blocks, seen ones first [1, 1, e, e].
    """
    order_ee = is_seen_ee.int().argsort(dim=1, descending=True, stable=True)
    return is_seen_ee.sum(1, dtype=torch.int32)[None, None], order_ee.int()[None, None]


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)
