"""Sets the switches of PyTorch that a run's flags ask for; they hold for the whole process."""

import os

import torch
from torch.nn.attention import activate_flash_attention_impl

from megatron.config import Config
from megatron.errors import ConfigError
from megatron.parallel.mesh import Mesh


def configure_pytorch(config: Config, mesh: Mesh) -> None:
    """Make PyTorch follow `--tf32`, `--flash-attention` and `--deterministic-mode`; raises ConfigError if it cannot."""
    _set_tf32(config, mesh)
    _set_flash_attention(config, mesh)
    _set_deterministic(config, mesh)


def _set_tf32(config: Config, mesh: Mesh) -> None:
    """Compute fp32 products in TF32 if `--tf32` asks for it; raises ConfigError without a GPU that has it."""
    if not config.precision.tf32:
        return
    if mesh.device.type != "cuda" or torch.cuda.get_device_capability(mesh.device) < (8, 0):
        raise ConfigError(f"--tf32 needs a GPU of compute capability 8.0 or later, and this run is on {mesh.device}; "
                          "leave it out")
    # This call sets the older names of the setting too, which inductor reads; PyTorch 2.10 refuses if they disagree.
    torch.set_float32_matmul_precision("high")


def _set_flash_attention(config: Config, mesh: Mesh) -> None:
    """Make PyTorch use the version of FlashAttention that `--flash-attention` names; raises ConfigError if it cannot.
    """
    wanted = config.training.flash_attention
    if wanted == "FA2":
        return
    if mesh.device.type != "cuda":
        raise ConfigError(f"--flash-attention {wanted} is for GPUs, and this run is on {mesh.device}; leave it out")
    has, takes = torch.cuda.get_device_capability(mesh.device), {"FA3": [9], "FA4": [9, 10]}[wanted]
    if has[0] not in takes:
        needed = " or ".join(f"{major}.0" for major in takes)
        raise ConfigError(f"--flash-attention {wanted} needs a GPU of compute capability {needed}, and this one has "
                          f"{has[0]}.{has[1]}; leave it out")
    try:
        activate_flash_attention_impl(wanted)
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"--flash-attention {wanted} cannot be loaded ({error}); install it (package "
                          f"{'flash_attn_3' if wanted == 'FA3' else 'flash-attn-4'}), or leave it out") from error


def _set_deterministic(config: Config, mesh: Mesh) -> None:
    """Make a GPU add in a fixed order where `--deterministic-mode` asks for it; CPUs always do.

    Otherwise FlashAttention's backward pass and PyTorch's index sums add in the order in which threads arrive. An
    operation without a deterministic implementation raises a RuntimeError that names it. cuBLAS reads its variable when
    it is first used (its documentation, "Results Reproducibility").
    """
    if config.training.deterministic_mode and mesh.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # No code reads memory that it has not written, so filling it would only take time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
