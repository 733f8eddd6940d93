"""Initial weights, as in Megatron-LM: normal, with the outputs of residual branches scaled down by sqrt(2 x layers).

Each parameter's values depend on the seed, its name and its declaration alone, so that any layout can slice them from
the same whole.
"""

import math
from collections.abc import Mapping

import torch
from torch import nn

from megatron.config import ModelConfig
from megatron.parallel.parameters import Constant, Initial, Normal, declaration_of
from megatron.parallel.placement import placement_of
from megatron.parallel.randomness import seed_for


def normal(config: ModelConfig) -> Normal:
    """The initial values of every matrix but those of `residual_output`."""
    return Normal(config.init_method_std)


def residual_output(config: ModelConfig) -> Initial:
    """The initial values of a matrix whose products are added to the residual stream, as twice in each layer."""
    if config.zero_init_output:  # each block is at first the identity (Bachlechner et al., 2020, arXiv 2003.04887)
        return Constant(0.0)
    return Normal(config.init_method_std / math.sqrt(2 * config.num_layers))


@torch.no_grad()
def initialise(parameters: Mapping[str, nn.Parameter], seed: int) -> None:
    """Fill every parameter, this rank's part of it, in place with what it declares."""
    for name, parameter in parameters.items():
        generator = torch.Generator().manual_seed(seed_for(seed, "weight", name))
        placement = placement_of(parameter)
        whole = declaration_of(parameter).initial.values(placement.whole_shape(parameter), generator)
        parameter.copy_(placement.cut(whole, parameter))
