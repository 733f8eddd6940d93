"""Pads and cuts the vocabulary's rows: other programs pad them for the number of tensor-parallel ranks."""

import torch
from torch import Tensor

from megatron.checkpoint.contents import Box, Checkpoint, Piece, StoredTensor

WORDS, BIAS = "embedding.word_embeddings.weight", "lm_head.bias"
OUTPUT = "lm_head.decoder.weight"  # only if the output layer is not tied to the word embedding
_OF_TOKENS = (WORDS, OUTPUT, BIAS, ".attention.values.weight")  # suffixes of tensors with a row for each token
_NEVER = -1e4  # the logit of padding: its probability is 0 in every precision


def rows_for(num_rows: int, num_tensor: int, checkpoint: Checkpoint) -> int:
    """`num_rows` rounded up to a multiple of `num_tensor` times the checkpoint's --make-vocab-size-divisible-by."""
    each = num_tensor * (checkpoint.state.get("config", {}).get("make_vocab_size_divisible_by") or 128)
    return -(-num_rows // each) * each


def trimmed(checkpoint: Checkpoint, vocab_size: int) -> Checkpoint:
    """The checkpoint with the padding that a single rank has for `vocab_size` tokens."""
    return with_rows(checkpoint, rows_for(vocab_size, 1, checkpoint))


def with_rows(checkpoint: Checkpoint, num_rows: int) -> Checkpoint:
    """The checkpoint with its vocabulary cut or padded to `num_rows` rows.

    Added rows are 0, except in the head's bias, where they are so low that the token is never predicted.
    """
    def fitting(name: str, tensor: StoredTensor) -> StoredTensor:
        if not tensor.shape or not name.endswith(_OF_TOKENS):
            return tensor
        return _with_rows(tensor, num_rows, _NEVER if name == BIAS else 0.0)

    return checkpoint.mapped(fitting)


def _with_rows(tensor: StoredTensor, num_rows: int, value: float) -> StoredTensor:
    """A tensor cut to `num_rows` rows, or extended to them with rows of `value`."""
    there = tensor.shape[0]
    sizes = (num_rows, *tensor.shape[1:])
    if num_rows == there:
        return tensor
    if num_rows < there:
        return tensor.part(tuple(slice(0, size) for size in sizes))

    def read(box: Box) -> Tensor:
        return torch.full([part.stop - part.start for part in box], value, dtype=tensor.dtype)

    begin = (there, *(0,) * (len(sizes) - 1))
    return StoredTensor(sizes, tensor.dtype, (*tensor.pieces, Piece(begin, (num_rows - there, *sizes[1:]), read)))
