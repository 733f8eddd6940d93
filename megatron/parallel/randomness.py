"""Random numbers that depend on what they are for, never on what was drawn before.

A parameter's initial values derive from the seed and its name, a micro-batch's dropout from the seed and its first
sample. So a resumed run needs no saved generator state, and any layout starts from the same weights.
"""

import hashlib

import torch


def seed_for(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, e.g. `seed_for(1234, "dropout", sample)`."""
    text = ":".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def seed_dropout(seed: int, first_sample: int) -> None:
    """Seed the default generators of all devices for the micro-batch that begins with `first_sample`."""
    torch.manual_seed(seed_for(seed, "dropout", first_sample))
