"""Says in one log line which implementation each operation of a run uses, so that a slow one is noticed at once."""

import torch

from megatron.config import Config
from megatron.errors import ConfigError
from megatron.kernels.attention.backends import BACKENDS, choose, in_words
from megatron.kernels.device import has_triton, takes_compilation, takes_triton
from megatron.kernels.fp8 import recipe_of
from megatron.kernels.fp8 import way_of as way_of_fp8
from megatron.kernels.pointwise.native import TAPS, is_built, takes_native
from megatron.model.protein_model import compute_dtype
from megatron.parallel.mesh import Mesh


def ways(config: Config, mesh: Mesh, is_compiled: bool) -> str:
    """The log line: what computes attention, the pointwise operations, the loss, the update and products in FP8.

    It says why nothing faster does. `is_compiled`: whether blocks run under torch.compile. Raises ConfigError where
    only Triton is missing, where `--attention-backend`, `--flash-attention` or `--cuda-graph` cannot be honoured, and
    where a GPU does not multiply in FP8.
    """
    model, dtype = config.model, compute_dtype(config.precision)
    groups = model.num_groups // mesh.tensor.size
    rows = model.num_attention_heads // model.num_groups + 2
    qkv_tgcd = torch.empty(0, groups, rows, model.kv_channels, dtype=dtype, device=mesh.device)
    attention = _attention(config, qkv_tgcd, mesh.context.size == 1)
    between = _between(qkv_tgcd, model.qkv_conv_kernel)
    loss = between if takes_triton(qkv_tgcd) else "PyTorch"
    if is_compiled:
        joins = takes_triton(qkv_tgcd) and model.hidden_dropout > 0
        between = "torch.compile, but for dropout Triton's kernels" if joins else "torch.compile"
    recipe = recipe_of(config.precision)
    kind = f"{config.precision.fp8}, {config.precision.fp8_recipe}"
    fp8 = "" if recipe is None else f"; the blocks' products in FP8 ({kind}) by {way_of_fp8(recipe, mesh.device)}"
    return (f"attention by {attention}; between matrix products {between}; the loss by {loss}; "
            f"the update by {_update(config, qkv_tgcd)}{fp8}"
            f"{'; every sum in one order' if config.training.deterministic_mode else ''}")


def _attention(config: Config, qkv_tgcd: torch.Tensor, is_whole: bool) -> str:
    """What computes attention; raises ConfigError where a flag has no effect, or cannot be honoured, with that."""
    model, training = config.model, config.training
    names, said = set(), []
    for window in dict.fromkeys(model.window(number) for number in range(model.num_layers)):
        case = qkv_tgcd, model.attention_dropout > 0, window, is_whole
        name = choose(*case, model.attention_backend)
        names.add(name)
        said.append(in_words(name, model.attention_backend != "auto", *case))
    words = ", and by ".join(dict.fromkeys(said))
    if training.flash_attention != "FA2" and "varlen" not in names:
        raise ConfigError(f"--flash-attention {training.flash_attention} is for {BACKENDS['varlen'].words}, and "
                          f"attention is by {words}; leave it out")
    if training.cuda_graph and "plain" in names:
        raise ConfigError(f"--cuda-graph cannot capture a run that asks the host for proteins' lengths, and attention "
                          f"is by {words}; leave it out")
    return words


def _update(config: Config, tensor: torch.Tensor) -> str:
    """What computes the optimizer's update; `tensor`: one like the activations."""
    optimizer, adamw = config.optimizer, "PyTorch's fused AdamW"
    if optimizer.uses_muon:
        products = "half of each by Triton's kernels" if takes_triton(tensor) else "whole by PyTorch"
        rest = "torch.compile" if takes_compilation(tensor) else "PyTorch"
        name = {"muon": "Muon", "normuon": "NorMuon"}[optimizer.optimizer]
        return f"{name} (its symmetric products {products}, momentum and step by {rest}) and {adamw}"
    if optimizer.optimizer_backend == "apex":
        return "apex (for which the host waits in every step)"
    return adamw if optimizer.optimizer == "adam" else "PyTorch's SGD, all parameters at once"


def _between(tensor: torch.Tensor, taps: int | None) -> str:
    """What computes the pointwise operations between matrix products; `taps`: of `--qkv-conv-kernel`."""
    if takes_triton(tensor):
        return "Triton's kernels"
    if takes_native(tensor):
        is_left = taps is not None and taps not in TAPS
        return f"the C++ helper{f', but for the convolution of {taps} PyTorch' if is_left else ''}"
    if tensor.is_cuda:
        return f"PyTorch, in several passes (Triton {'takes no such GPU' if has_triton() else 'is not installed'})"
    return f"PyTorch, in several passes (the C++ helper {'takes fp32 and bf16' if is_built() else 'is not built'})"
