"""States of random numbers as Megatron's checkpoints hold them: fresh ones, for ours have none."""

import random
from typing import Any

import numpy as np
import torch

_OF_TENSOR_RANKS = 2718  # what Megatron adds to the seed of the numbers that tensor ranks do not share


def random_states(seed: int, tensor_rank: int, pipeline_rank: int) -> dict[str, Any]:
    """Those of a rank, as the original's seeds give them; the device's are of the kind of device that is here.

    How long the state of a GPU is depends on its PyTorch: where another one finds it too short or too long, the
    original's --no-load-rng leaves it.
    """
    seed += 100 * pipeline_rank
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def state_of(number: int, device: torch.device) -> torch.Tensor:
        return torch.Generator(device).manual_seed(number).get_state()

    return {"random_rng_state": random.Random(seed).getstate(),
            "np_rng_state": np.random.RandomState(seed).get_state(),
            "torch_rng_state": state_of(seed, torch.device("cpu")), "cuda_rng_state": state_of(seed, device),
            "rng_tracker_states": {"model-parallel-rng": state_of(seed + _OF_TENSOR_RANKS + tensor_rank, device)}}
