"""Attention a protein at a time: two matrix products and a softmax each, on any device.

Shapes: u tokens with queries, t tokens with keys and values, n heads in g groups of q, d head width, k keys of a tile.
Queries, keys and values of a token are c = q + 2 rows of width d for each group: the queries, the key, the value.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.kernels.device import takes_gpu_way
from megatron.kernels.dropout import Dropout, Use, is_kept
from megatron.kernels.packed_sequence import PackedSequence, protein_lengths

Window = tuple[int, int] | None
_IS_SLOW = ("attention is computed one protein at a time, and the host waits for the GPU (there are kernels from "
            "compute capability 8.0 on, for fp16, bf16 or fp32 and heads up to 256 wide)")
_LEAST_QUERIES = 128  # of a tile under a window: fewer are not faster


@dataclass(frozen=True)
class Tile:
    """Queries of one protein that are computed together: where they lie among those here, and their keys among all.

    `shift`: how far the first query's token lies behind the first key's.
    """

    queries: slice
    keys: slice
    shift: int

    @property
    def num_queries(self) -> int:
        """Tokens with queries."""
        return self.queries.stop - self.queries.start

    @property
    def num_keys(self) -> int:
        """Tokens with keys."""
        return self.keys.stop - self.keys.start


def tiles_of(lengths: Sequence[int], start: int, end: int, window: Window = None) -> list[Tile]:
    """The tiles of the queries of tokens `start:end` of proteins of these lengths; without a window one a protein."""
    tiles, begin = [], 0
    for length in lengths:
        stop = begin + length
        first, last = max(begin, start), min(stop, end)
        if first < last:
            step = last - first if window is None else max(sum(window), _LEAST_QUERIES)
            for query in range(first, last, step):
                behind = min(query + step, last)
                keys = (begin, stop) if window is None else (max(begin, query - window[0]),
                                                             min(stop, behind + window[1]))
                tiles.append(Tile(slice(query - start, behind - start), slice(*keys), query - keys[0]))
        begin = stop
    return tiles


class ProteinPass:
    """Forward and backward pass over proteins of these lengths; the queries are those of u tokens from `start` on."""

    def __init__(self, lengths: Sequence[int], start: int, num_queries: int, window: Window,
                 dropout: Dropout | None) -> None:
        self.tiles, self.window = tiles_of(lengths, start, start + num_queries, window), window
        self.dropout = None if dropout is None else dropout.from_row(start)

    def forward(self, query_ugqd: Tensor, key_value_tg2d: Tensor) -> tuple[Tensor, ...]:
        """The context [u, g, q, d], 0 behind the last protein, and what the backward pass needs beside it."""
        context_ugqd, kept = forward_by_protein(query_ugqd, key_value_tg2d, self.tiles, self.window, self.dropout)
        return context_ugqd, *kept

    def backward(self, grad_ugqd: Tensor, inputs: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor],
                 made: Sequence[Tensor]) -> None:
        """Fill `gradients` of `inputs`, queries and keys with values, from that of the context; `made` is forward's.

        Those of keys and values of proteins without a query here are left as they are.
        """
        backward_by_protein(grad_ugqd, inputs, gradients, self.tiles, iter(made[1:]), self.dropout is not None)


def forward_by_protein(query_ugqd: Tensor, key_value_tg2d: Tensor, tiles: Sequence[Tile], window: Window,
                       dropout: Dropout | None) -> tuple[Tensor, list[Tensor]]:
    """The context [u, g, q, d], 0 behind the last protein, and what the backward pass needs.

    That is the probabilities [g, q·queries, k] of each tile, each followed by dropout's factors if there is any.
    """
    if takes_gpu_way(query_ugqd):
        warnings.warn(_IS_SLOW, stacklevel=2)
    context_ugqd = torch.empty_like(query_ugqd, memory_format=torch.contiguous_format)
    context_ugqd[_num_queries(tiles):] = 0
    kept: list[Tensor] = []
    for tile, query, key, value in _tiled(query_ugqd, key_value_tg2d, tiles):
        scores = torch.bmm(query * query.shape[-1]**-0.5, key.transpose(1, 2))
        if window is not None:
            is_outside = _is_outside(tile, window, scores.device)
            scores.unflatten(1, (-1, tile.num_queries)).masked_fill_(is_outside, -torch.inf)
        probabilities = scores.softmax(-1)
        kept.append(probabilities)
        if dropout:
            factors = _factors(dropout, tile, probabilities)
            kept.append(factors)
            probabilities = probabilities * factors
        _put(context_ugqd, tile, torch.bmm(probabilities, value))
    return context_ugqd, kept


def backward_by_protein(grad_ugqd: Tensor, inputs: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor],
                        tiles: Sequence[Tile], kept: Iterator[Tensor], has_dropout: bool) -> None:
    """Fill `gradients` of `inputs`, queries [u, g, q, d] and keys with values [t, g, 2, d], from that of the context.

    Those of keys and values of which no tile here has any are left as they are.
    """
    gradients[0][_num_queries(tiles):] = 0
    filled = 0  # keys up to here have a gradient
    for tile, query, key, value in _tiled(*inputs, tiles):
        probabilities = next(kept)
        grad_context = _rows(grad_ugqd, tile)
        grad_probabilities = torch.bmm(grad_context, value.transpose(1, 2))
        dropped = probabilities
        if has_dropout:
            keep = next(kept)
            grad_probabilities *= keep
            dropped = probabilities * keep
        grad_scores = torch._softmax_backward_data(grad_probabilities, probabilities, -1, probabilities.dtype)
        grad_scores *= query.shape[-1]**-0.5
        _put(gradients[0], tile, torch.bmm(grad_scores, key))
        again = max(0, filled - tile.keys.start)  # keys that an earlier tile of the protein has had
        for place, product in enumerate((torch.bmm(grad_scores.transpose(1, 2), query),
                                         torch.bmm(dropped.transpose(1, 2), grad_context))):
            there = gradients[1][tile.keys, :, place].transpose(0, 1)
            there[:, :again] += product[:, :again]
            there[:, again:] = product[:, again:]
        filled = tile.keys.stop


def _factors(dropout: Dropout, tile: Tile, probabilities: Tensor) -> Tensor:
    """By which dropout multiplies a tile's probabilities [g, q·queries, k]."""
    num_heads = len(probabilities) * (probabilities.shape[1] // tile.num_queries)
    keeps_nqk = is_kept(dropout.from_row(dropout.first_row + tile.queries.start), tile.num_queries,
                        range(tile.keys.start, tile.keys.stop), num_heads)
    return keeps_nqk.view_as(probabilities).to(probabilities.dtype) * dropout.growth


def _num_queries(tiles: Sequence[Tile]) -> int:
    return tiles[-1].queries.stop if tiles else 0


def _is_outside(tile: Tile, window: tuple[int, int], device: torch.device) -> Tensor:
    """Whether a key [queries, k] is further from the query than the window lets it see."""
    query = torch.arange(tile.shift, tile.shift + tile.num_queries, device=device)
    behind = torch.arange(tile.num_keys, device=device) - query[:, None]
    return (behind < -window[0]) | (behind > window[1])


def _tiled(query_ugqd: Tensor, key_value_tg2d: Tensor,
           tiles: Sequence[Tile]) -> Iterator[tuple[Tile, Tensor, Tensor, Tensor]]:
    """Each tile's queries [g, q·queries, d], keys and values [g, k, d]."""
    for tile in tiles:
        key, value = key_value_tg2d[tile.keys].permute(2, 1, 0, 3)
        yield tile, _rows(query_ugqd, tile), key, value


def _rows(whole_ugqd: Tensor, tile: Tile) -> Tensor:
    """A tile's [g, q·queries, d]: a view where a group has one query."""
    return whole_ugqd[tile.queries].permute(1, 2, 0, 3).flatten(1, 2)


def _put(whole_ugqd: Tensor, tile: Tile, rows: Tensor) -> None:
    """What `_rows` takes, put back."""
    whole_ugqd[tile.queries].permute(1, 2, 0, 3).copy_(rows.unflatten(1, (-1, tile.num_queries)))


def attention_by_protein(qkv_tgcd: Tensor, sequence: PackedSequence, dropout: Dropout | None,
                         window: Window) -> Tensor:
    """The context [t, n, d] of whole proteins by PyTorch, 0 in the filler; `dropout` is that of the probabilities."""
    cu_seqlens, num_filler = sequence.cu_seqlens, sequence.num_filler
    if torch.compiler.is_compiling():
        left, right = window or (-1, -1)
        seed, rate, first_head = (dropout.seed, dropout.rate, dropout.first_head) if dropout else (None, 0.0, 0)
        context_tgqd = _operator(qkv_tgcd, cu_seqlens, seed, num_filler, left, right, rate, first_head)[0]
    else:
        context_tgqd = _ByProtein.apply(qkv_tgcd, cu_seqlens, num_filler, window, dropout)
    return context_tgqd.flatten(1, 2)


class _ByProtein(torch.autograd.Function):
    """`forward_by_protein` of whole proteins."""

    @staticmethod
    def forward(ctx: Any, qkv_tgcd: Tensor, cu_seqlens: Tensor, num_filler: int, window: Window,
                dropout: Dropout | None) -> Tensor:
        tiles = tiles_of(protein_lengths(cu_seqlens, num_filler), 0, len(qkv_tgcd), window)
        context_tgqd, kept = forward_by_protein(qkv_tgcd[:, :, :-2], qkv_tgcd[:, :, -2:], tiles, window, dropout)
        ctx.save_for_backward(qkv_tgcd, *kept)
        ctx.tiles, ctx.has_dropout = tiles, dropout is not None
        return context_tgqd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_tgqd: Tensor) -> tuple[Tensor, None, None, None, None]:
        qkv_tgcd, *kept = ctx.saved_tensors
        return _whole_gradient(grad_tgqd, qkv_tgcd, ctx.tiles, iter(kept), ctx.has_dropout), None, None, None, None


def _whole_gradient(grad_tgqd: Tensor, qkv_tgcd: Tensor, tiles: Sequence[Tile], kept: Iterator[Tensor],
                    has_dropout: bool) -> Tensor:
    grad_tgcd = torch.empty_like(qkv_tgcd)
    grad_tgcd[_num_queries(tiles):] = 0
    inputs, gradients = ((tensor[:, :, :-2], tensor[:, :, -2:]) for tensor in (qkv_tgcd, grad_tgcd))
    backward_by_protein(grad_tgqd, inputs, gradients, tiles, kept, has_dropout)
    return grad_tgcd


# The same as an operator that torch.compile takes as it is; traced, each new list of lengths would compile anew. What
# the backward pass needs is one tensor, of a size that no shape tells. A window of -1 is none.
@torch.library.custom_op("megatron::attention_by_protein", mutates_args=())
def _operator(qkv_tgcd: Tensor, cu_seqlens: Tensor, seed: Tensor | None, num_filler: int, left: int, right: int,
              rate: float, first_head: int) -> tuple[Tensor, Tensor]:
    window = None if left < 0 else (left, right)
    dropout = None if seed is None else Dropout(rate, seed, Use.PROBABILITIES, first_head=first_head)
    tiles = tiles_of(protein_lengths(cu_seqlens, num_filler), 0, len(qkv_tgcd), window)
    context_tgqd, kept = forward_by_protein(qkv_tgcd[:, :, :-2], qkv_tgcd[:, :, -2:], tiles, window, dropout)
    return context_tgqd, torch.cat([qkv_tgcd.new_empty(0), *(tensor.flatten() for tensor in kept)])


@torch.library.custom_op("megatron::attention_by_protein_backward", mutates_args=())
def _operator_backward(grad_tgqd: Tensor, qkv_tgcd: Tensor, cu_seqlens: Tensor, kept: Tensor, num_filler: int,
                       left: int, right: int, has_dropout: bool) -> Tensor:
    tiles = tiles_of(protein_lengths(cu_seqlens, num_filler), 0, len(qkv_tgcd), None if left < 0 else (left, right))
    groups, queries = qkv_tgcd.shape[1], qkv_tgcd.shape[2] - 2
    shapes = [(groups, queries * tile.num_queries, tile.num_keys) for tile in tiles for _ in range(1 + has_dropout)]
    pieces = kept.split([rows * columns * groups for _, rows, columns in shapes])
    views = (piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True))
    return _whole_gradient(grad_tgqd, qkv_tgcd, tiles, views, has_dropout)


@_operator.register_fake
def _(qkv_tgcd: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(qkv_tgcd[:, :, :-2]).contiguous(), qkv_tgcd.new_empty(
        torch.library.get_ctx().new_dynamic_size())


@_operator_backward.register_fake
def _(grad_tgqd: Tensor, qkv_tgcd: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(qkv_tgcd)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv_tgcd, cu_seqlens, seed, *numbers = inputs
    ctx.numbers = *numbers[:3], seed is not None
    ctx.save_for_backward(qkv_tgcd, cu_seqlens, output[1])


def _go_back(ctx: Any, grad_tgqd: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _operator_backward(grad_tgqd, *ctx.saved_tensors, *ctx.numbers), *[None] * 7


_operator.register_autograd(_go_back, setup_context=_keep)
