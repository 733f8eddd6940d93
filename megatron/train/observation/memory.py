"""How much memory the ranks of a run have held."""

import resource

import torch

from megatron.parallel.collectives import all_reduce_max
from megatron.parallel.mesh import Mesh


def count_from_here(mesh: Mesh) -> None:
    """Leave out what a GPU has held up to here, as the measuring of its speed takes."""
    if mesh.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(mesh.device)


def peak_memory_gib(mesh: Mesh) -> float:
    """The most that a rank has held, in GiB: of a GPU its tensors since its first step, of a CPU its process.

    Of the rank that has held most; all ranks call this.
    """
    if mesh.device.type == "cuda":
        num_bytes = torch.cuda.max_memory_allocated(mesh.device)
    else:
        num_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held = torch.tensor([num_bytes / 2**30], dtype=torch.float64, device=mesh.device)
    return float(all_reduce_max(held, mesh.world))
