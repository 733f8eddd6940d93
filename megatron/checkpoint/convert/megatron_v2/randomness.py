"""Random-number states for Megatron's checkpoints; they are fresh, since our checkpoints hold none."""

import random
from typing import Any

import numpy as np
import torch

_OF_TENSOR_RANKS = 2718  # Megatron's offset for the seed of the generator that differs between tensor ranks


def random_states(seed: int, tensor_rank: int, pipeline_rank: int) -> dict[str, Any]:
    """The entries of a rank's file with the states of all generators, seeded as Megatron seeds them at the start.

    The device's states are for a GPU, whatever this machine has, in the form of PyTorch 2.1 and later: an earlier
    version rejects their size unless Megatron is told --no-load-rng.
    """
    seed += 100 * pipeline_rank
    return {"random_rng_state": random.Random(seed).getstate(),
            "np_rng_state": np.random.RandomState(seed).get_state(),
            "torch_rng_state": torch.Generator().manual_seed(seed).get_state(), "cuda_rng_state": _state_of_gpu(seed),
            "rng_tracker_states": {"model-parallel-rng": _state_of_gpu(seed + _OF_TENSOR_RANKS + tensor_rank)}}


def _state_of_gpu(seed: int) -> torch.Tensor:
    """The state of a GPU's generator after manual_seed, uint8 [16]: the seed and the offset 0, 64 bits each."""
    return torch.from_numpy(np.array([seed, 0], dtype="<u8").view(np.uint8))
