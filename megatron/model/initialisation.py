"""Initial weights, as in Megatron-LM: normal, with the outputs of residual branches scaled down by sqrt(2 x layers).

A parameter's values depend only on the seed, its name and its declaration, so that every layout slices the same whole.
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
    """The initial values of all matrices except those that `residual_output` is for."""
    return Normal(config.init_method_std)


def residual_output(config: ModelConfig) -> Initial:
    """The initial values of a matrix whose output is added to the residual stream; each layer has two of them."""
    if config.zero_init_output:  # each block starts as the identity (Bachlechner et al., 2020, arXiv 2003.04887)
        return Constant(0.0)
    return Normal(config.init_method_std / math.sqrt(2 * config.num_layers))


@torch.no_grad()
def initialise(parameters: Mapping[str, nn.Parameter], seed: int) -> None:
    """Fill this rank's part of every parameter in place with the initial values that it declares."""
    for name, parameter in parameters.items():
        generator = torch.Generator().manual_seed(seed_for(seed, "weight", name))
        placement = placement_of(parameter)
        initial, shape = declaration_of(parameter).initial, placement.whole_shape(parameter)
        # A name for the whole would keep it in memory while the next one is drawn.
        parameter.copy_(placement.cut(initial.values(shape, generator), parameter))
