"""The vocabulary's rows, of which other programs have more the more tensor ranks share them."""

from dataclasses import replace

import torch
from torch import Tensor

from megatron.checkpoint.stored import Box, Checkpoint, Piece, StoredTensor, Tensors

WORDS, BIAS = "embedding.word_embeddings.weight", "lm_head.bias"
OUTPUT = "lm_head.decoder.weight"  # where it is not the word embedding
_OF_TOKENS = (WORDS, OUTPUT, BIAS, ".attention.values.weight")  # endings of names
_NEVER = -1e4  # the logit of a token that is none: its share of the softmax is 0 in every precision


def rows_for(num_rows: int, num_tensor: int, checkpoint: Checkpoint) -> int:
    """How many rows there are for so many tokens on `num_tensor` ranks, by --make-vocab-size-divisible-by."""
    each = num_tensor * (checkpoint.state.get("config", {}).get("make_vocab_size_divisible_by") or 128)
    return -(-num_rows // each) * each


def trimmed(checkpoint: Checkpoint, vocab_size: int) -> Checkpoint:
    """The checkpoint with the rows that one rank has for a vocabulary of so many tokens."""
    return with_rows(checkpoint, rows_for(vocab_size, 1, checkpoint))


def with_rows(checkpoint: Checkpoint, num_rows: int) -> Checkpoint:
    """The checkpoint with `num_rows` rows of the vocabulary, cut or added to.

    Rows that are added are 0, but in the head's bias: there they say that the token never is.
    """
    def fitting(name: str, tensor: StoredTensor, value: float) -> StoredTensor:
        return _with_rows(tensor, num_rows, value) if tensor.shape and name.endswith(_OF_TOKENS) else tensor

    def weights(tensors: Tensors) -> dict[str, StoredTensor]:
        return {name: fitting(name, tensor, _NEVER if name == BIAS else 0.0) for name, tensor in tensors.items()}

    optimizer = checkpoint.optimizer
    if optimizer is not None:
        optimizer = {key: fitting(key, tensor, 0.0) for key, tensor in optimizer.items()}
    return replace(checkpoint, model=weights(checkpoint.model), optimizer=optimizer,
                   average=None if checkpoint.average is None else weights(checkpoint.average))


def _with_rows(tensor: StoredTensor, num_rows: int, value: float) -> StoredTensor:
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
