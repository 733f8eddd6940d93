"""The vocabulary's rows, of which Megatron has more the more tensor ranks share them."""

import torch
from torch import Tensor

from megatron.checkpoint.stored import Box, Piece, StoredTensor

_WORDS, _BIAS = "embedding.word_embeddings.weight", "lm_head.bias"
_NEVER = -1e4  # the logit of a token that is none: its share of the softmax is 0 in every precision


def padded_size(num_rows: int, vocab_size: int | None, num_tensor: int, multiple: int) -> int:
    """Megatron's number of rows: the next multiple of `multiple` on each rank, of the tokens if these are known."""
    each = multiple * num_tensor
    return -(-(num_rows if vocab_size is None else vocab_size) // each) * each


def with_rows(name: str, tensor: StoredTensor, num_rows: int, key: str) -> StoredTensor:
    """A tensor that lies as parameter `name` does, with `num_rows` of the vocabulary's if it has any.

    Rows that are added are 0, but in the head's bias (`key` is its name, not a moment's): there they say that the
    token never is.
    """
    if name not in (_WORDS, _BIAS) or tensor.shape[0] == num_rows:
        return tensor
    sizes = (num_rows, *tensor.shape[1:])
    if num_rows < tensor.shape[0]:
        return tensor.part(tuple(slice(0, size) for size in sizes))
    added, value = (num_rows - tensor.shape[0], *tensor.shape[1:]), _NEVER if key == _BIAS else 0.0

    def read(box: Box) -> Tensor:
        return torch.full([part.stop - part.start for part in box], value, dtype=tensor.dtype)

    begin = (tensor.shape[0], *(0,) * (len(sizes) - 1))
    return StoredTensor(sizes, tensor.dtype, (*tensor.pieces, Piece(begin, added, read)))
