"""Random numbers that depend on what they are for, never on what was drawn before.

A parameter's initial values derive from the seed and its name; what dropout keeps (`megatron.kernels.dropout`) from the
seed, the micro-batch's first sample, the block, and a number's place. So a resumed run needs no saved generator state,
and any layout starts from the same weights and drops the same.
"""

import hashlib

from torch import nn

from megatron.kernels.dropout import Dropout, Use
from megatron.kernels.packed_sequence import PackedSequence


def seed_for(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, e.g. `seed_for(1234, "dropout", sample)`."""
    text = ":".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def dropout_seed(seed: int, first_sample: int) -> int:
    """That of the micro-batch that begins with `first_sample`, in the run of this seed."""
    return seed_for(seed, "dropout", first_sample)


def dropout_of(module: nn.Module, sequence: PackedSequence, use: Use, first_head: int = 0) -> Dropout | None:
    """Dropout at a module's rate, its `dropout`; None outside training.

    Where the rate is always 0, the module's mode is not looked at, so that a graph compiled for training serves
    evaluation.
    """
    rate = module.dropout
    if not rate or not module.training:
        return None
    assert isinstance(rate, float) and sequence.seed is not None, "who trains with dropout gives it a seed"
    return Dropout(rate, sequence.seed, use, first_head=first_head)
