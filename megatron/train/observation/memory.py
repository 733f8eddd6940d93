"""The peak memory of the ranks of a run."""

import resource

import torch

from megatron.parallel.collectives import all_reduce_max
from megatron.parallel.mesh import Mesh
from megatron.parallel.waits import read


def count_from_here(mesh: Mesh) -> None:
    """Start counting a GPU's peak memory here, so that measuring its speed before does not count."""
    if mesh.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(mesh.device)


def peak_memory_gib(mesh: Mesh) -> float:
    """The peak memory, in GiB, of the rank that used most; a collective, so call it on all ranks.

    On GPUs: of tensors since `count_from_here`. On CPUs: of the whole process since it started.
    """
    if mesh.device.type == "cuda":
        num_bytes = torch.cuda.max_memory_allocated(mesh.device)
    else:
        num_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held = torch.tensor([num_bytes / 2**30], dtype=torch.float64, device=mesh.device)
    return float(read(all_reduce_max(held, mesh.world)))
