"""The normalisations of a model: of the residual stream, and of each head's queries and keys. Shape: d head width."""

from torch import Tensor, nn

from megatron.config import ModelConfig
from megatron.kernels.pointwise.residual_norm import Scaling, normalised
from megatron.parallel.mesh import Axis
from megatron.parallel.parameters import BIAS, SCALE, split_parameter
from megatron.parallel.tensor.stream import Stream


class Norm(nn.Module):
    """A norm over the hidden axis of the residual stream, as `--normalization` says; statistics in fp32.

    LayerNorm (Ba et al., 2016, arXiv 1607.06450), or without a bias RMSNorm: x / sqrt(mean(x²) + epsilon) times a scale
    (Zhang and Sennrich, 2019, arXiv 1910.07467).
    """

    def __init__(self, config: ModelConfig, stream: Stream) -> None:
        super().__init__()
        self.weight = stream.parameter((config.hidden_size,), SCALE)
        is_rms = config.normalization == "RMSNorm"
        self.bias = None if is_rms else stream.parameter((config.hidden_size,), BIAS)
        self.epsilon = config.layernorm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        """The same shape and dtype as `x`."""
        return normalised(x, scaling_of(self), x.dtype)[1]


def scaling_of(norm: Norm | None) -> Scaling | None:
    """The norm's parameters as kernels take them; None without a norm."""
    return None if norm is None else Scaling(norm.weight, norm.bias, norm.epsilon)


class HeadNorm(nn.Module):
    """The scales [d] of each head's norm, which `megatron.kernels.pointwise.heads` applies to queries and keys.

    It keeps attention scores from growing with the weights (Henry et al., 2020, arXiv 2010.04245; Dehghani et al.,
    2023, arXiv 2302.05442). The heads are split over the tensor axis.
    """

    def __init__(self, config: ModelConfig, num_heads: int, axis: Axis) -> None:
        super().__init__()
        self.weight = split_parameter((num_heads * config.kv_channels,), 0, axis, SCALE)
