"""The normalisations of a model: of the residual stream, and of each head's queries and keys. Shape: d head width."""

from torch import nn

from megatron.config import ModelConfig
from megatron.kernels.pointwise.residual_norm import Scaling
from megatron.parallel.mesh import Axis
from megatron.parallel.parameters import SCALE, split_parameter
from megatron.parallel.tensor.layers import LayerNorm, RMSNorm
from megatron.parallel.tensor.stream import Stream

Norm = LayerNorm | RMSNorm


def norm(config: ModelConfig, stream: Stream) -> Norm:
    """A normalisation of the residual stream: LayerNorm or RMSNorm, as `--normalization` says."""
    kind = RMSNorm if config.normalization == "RMSNorm" else LayerNorm
    return kind(config.hidden_size, config.layernorm_epsilon, stream)


def scaling_of(norm: Norm | None) -> Scaling | None:
    """The normalisation's parameters as kernels take them; None without a normalisation."""
    return None if norm is None else norm.scaling


class HeadNorm(nn.Module):
    """The scales [d] of each head's norm, which `megatron.kernels.pointwise.heads` applies to queries and keys.

    It keeps attention scores from growing with the weights (Henry et al., 2020, arXiv 2010.04245; Dehghani et al.,
    2023, arXiv 2302.05442). The heads are split over the tensor axis.
    """

    def __init__(self, config: ModelConfig, num_heads: int, axis: Axis) -> None:
        super().__init__()
        self.weight = split_parameter((num_heads * config.kv_channels,), 0, axis, SCALE)
