"""Which normalisation, and of what. Shapes: t tokens, g groups of heads, c rows a group, d head width."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron.config import ModelConfig
from megatron.parallel.mesh import Axis
from megatron.parallel.parameters import SCALE, split_parameter
from megatron.parallel.tensor.layers import LayerNorm, RMSNorm
from megatron.parallel.tensor.stream import Stream


def norm(config: ModelConfig, stream: Stream) -> LayerNorm | RMSNorm:
    """A normalisation of the residual stream, as `--normalization` says."""
    kind = RMSNorm if config.normalization == "RMSNorm" else LayerNorm
    return kind(config.hidden_size, config.layernorm_epsilon, stream)


class HeadNorm(nn.Module):
    """Normalises the width of each head, which has a scale [d] of its own; without a bias.

    Of queries and keys it keeps the scores from growing with the weights (Henry et al., 2020, arXiv 2010.04245;
    Dehghani et al., 2023, arXiv 2302.05442). The heads are split over the tensor axis.
    """

    def __init__(self, config: ModelConfig, num_heads: int, axis: Axis) -> None:
        super().__init__()
        self.weight = split_parameter((num_heads * config.kv_channels,), 0, axis, SCALE)
        self.is_rms, self.epsilon = config.normalization == "RMSNorm", config.layernorm_epsilon

    def forward(self, x_tgcd: Tensor) -> Tensor:
        """The same shape and dtype."""
        width = x_tgcd.shape[-1:]
        normalise = F.rms_norm if self.is_rms else F.layer_norm
        normed_tgcd = normalise(x_tgcd, width, eps=self.epsilon)
        return normed_tgcd * self.weight.to(x_tgcd.dtype).view(x_tgcd.shape[1:])


def with_normed_queries_and_keys(qkv_tgcd: Tensor, query_norm: nn.Module, key_norm: nn.Module) -> Tensor:
    """The projection with queries and keys normalised, values as they are."""
    query_tgqd, key_tg1d, value_tg1d = qkv_tgcd.split([qkv_tgcd.shape[2] - 2, 1, 1], dim=2)
    return torch.cat([query_norm(query_tgqd), key_norm(key_tg1d), value_tg1d], dim=2)
