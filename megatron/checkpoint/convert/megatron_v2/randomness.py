"""Random-number states for Megatron's checkpoints; they are fresh, since our checkpoints hold none."""

import random
from typing import Any

import numpy as np
import torch

_OF_TENSOR_RANKS = 2718  # Megatron's offset for the seed of the generator that differs between tensor ranks


def random_states(seed: int, tensor_rank: int, pipeline_rank: int) -> dict[str, Any]:
    """The entries of a rank's file with the states of all generators, seeded as Megatron seeds them at the start.

    The device's states are for a GPU if there is one here, else for the CPU. The size of a GPU's state depends on the
    version of PyTorch; if Megatron's rejects it, load with --no-load-rng.
    """
    seed += 100 * pipeline_rank
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def state_of(number: int, device: torch.device) -> torch.Tensor:
        return torch.Generator(device).manual_seed(number).get_state()

    return {"random_rng_state": random.Random(seed).getstate(),
            "np_rng_state": np.random.RandomState(seed).get_state(),
            "torch_rng_state": state_of(seed, torch.device("cpu")), "cuda_rng_state": state_of(seed, device),
            "rng_tracker_states": {"model-parallel-rng": state_of(seed + _OF_TENSOR_RANKS + tensor_rank, device)}}
