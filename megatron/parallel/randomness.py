"""Random numbers that depend on their purpose, never on what was drawn before.

A parameter's initial values depend on the seed and its name, dropout's masks (`megatron.kernels.dropout`) on the seed,
the micro-batch's first sample, the block and the element's position. So a resumed run needs no generator state, and
every layout has the same initial weights and the same dropout.
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
    """The seed for dropout in the micro-batch whose first row is sample number `first_sample`."""
    return seed_for(seed, "dropout", first_sample)


def dropout_of(module: nn.Module, sequence: PackedSequence, use: Use, first_head: int = 0) -> Dropout | None:
    """Dropout at the rate `module.dropout`; None outside training.

    With a rate of 0 the module's mode is not read, so that a graph compiled for training also serves evaluation.
    """
    rate = module.dropout
    if not rate or not module.training:
        return None
    assert isinstance(rate, float) and sequence.seed is not None, "training with dropout needs a seed"
    return Dropout(rate, sequence.seed, use, first_head=first_head)
