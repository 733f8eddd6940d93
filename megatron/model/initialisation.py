"""Initial weights, as in Megatron-LM: normal, with the outputs of residual branches scaled down by sqrt(2 x layers).

Each parameter's values depend on the seed and its name alone, so that any layout can slice them from the same whole.
"""

import math

import torch
from torch import nn

from megatron.config import ModelConfig
from megatron.parallel.placement import placement_of
from megatron.parallel.randomness import seed_for

_RESIDUAL_OUTPUTS = ("attention.dense.weight", "mlp.dense_4h_to_h.weight")


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter of `model` in place: matrices normal, LayerNorm weights 1, biases 0."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0 if name.endswith("layernorm.weight") else 0.0)
            continue
        std = config.init_method_std
        if name.endswith(_RESIDUAL_OUTPUTS):
            std /= math.sqrt(2 * config.num_layers)
        generator = torch.Generator().manual_seed(seed_for(seed, "weight", name))
        # Drawn on the CPU, so that a GPU run starts from the same weights.
        placement = placement_of(parameter)
        whole = torch.empty(placement.whole_shape(parameter)).normal_(0.0, std, generator=generator)
        parameter.copy_(placement.cut(whole, parameter))
