"""What BERT has beside our models: parts that are left out, and token types, all 0 and added to the positions."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.contents import Box, StoredTensor, one_piece
from megatron.errors import CheckpointError

NOTE = "the embedding of token type 0, which all residues have, was added to the position embeddings"


def left_out(parts: Iterable[str]) -> str:
    """The note on parts of a model that are not taken over."""
    return f"left out: {', '.join(sorted(set(parts)))}, which take no part in the masked language model"


def with_first_type(positions: StoredTensor, types: StoredTensor, name: str, place: Path) -> StoredTensor:
    """The position embeddings plus the first row of `types`, lazily, in fp32.

    The model's sum of embeddings stays the same except for rounding, since it adds in another order. `name`: of
    `types`, for messages. Raises CheckpointError if its shape does not fit.
    """
    if len(types.shape) != 2 or not types.shape[0] or types.shape[1] != positions.shape[1]:
        raise CheckpointError(f"{place}: {name} is {list(types.shape)}, expected [types, {positions.shape[1]}]; copy "
                              "it again")

    def read(box: Box) -> Tensor:
        return positions.read_box(box).float() + types.read_box((slice(0, 1), box[1])).float()

    return one_piece(positions.shape, torch.float32, read)
