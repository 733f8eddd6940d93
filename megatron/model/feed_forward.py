"""The feed-forward half of a block. Shapes: u tokens of the residual stream on this rank, h hidden."""

from torch import Tensor, nn

from megatron.config import ModelConfig
from megatron.kernels.pointwise.activation import activated
from megatron.kernels.pointwise.product import Product
from megatron.model.initialisation import normal, residual_output
from megatron.parallel.tensor.layers import ColumnParallelLinear, RowParallelLinear, products_together
from megatron.parallel.tensor.stream import Stream


class FeedForward(nn.Module):
    """Two linear layers with an activation between, their width split over the tensor axis: [u, h] to [u, h].

    The activation is GeLU, exact or approximated by tanh, or squared ReLU.
    """

    def __init__(self, config: ModelConfig, stream: Stream) -> None:
        super().__init__()
        hidden, width, has_bias = config.hidden_size, config.ffn_hidden_size, not config.disable_bias_linear
        self.dense_h_to_4h = ColumnParallelLinear(hidden, width, stream, normal(config), has_bias)
        self.dense_4h_to_h = RowParallelLinear(width, hidden, stream, residual_output(config), has_bias)
        gelu = "gelu_tanh" if config.bias_gelu_fusion or config.openai_gelu else "gelu"
        self.activation = "squared_relu" if config.squared_relu else gelu

    def forward(self, hidden_uh: Tensor) -> Product:
        """The output [u, h], and the last bias if the kernel that follows is to add it."""
        return self.dense_4h_to_h.product(activated(self.activation, self.dense_h_to_4h.product(hidden_uh)))


class GatedFeedForward(nn.Module):
    """W₃(silu(W₂x) · W₁x), SwiGLU (Shazeer, 2020, arXiv 2002.05202): [u, h] to [u, h].

    W₁ is `dense_h_to_4h`, W₂ `gate`, W₃ `dense_4h_to_h`.
    """

    def __init__(self, config: ModelConfig, stream: Stream) -> None:
        super().__init__()
        hidden, width, has_bias = config.hidden_size, config.ffn_hidden_size, not config.disable_bias_linear
        self.gate = ColumnParallelLinear(hidden, width, stream, normal(config), has_bias)
        self.dense_h_to_4h = ColumnParallelLinear(hidden, width, stream, normal(config), has_bias)
        self.dense_4h_to_h = RowParallelLinear(width, hidden, stream, residual_output(config), has_bias)

    def forward(self, hidden_uh: Tensor) -> Product:
        """The output [u, h], and the last bias if the kernel that follows is to add it."""
        gate, wide = products_together(hidden_uh, self.gate, self.dense_h_to_4h)
        return self.dense_4h_to_h.product(activated("swiglu", wide, gate))


def feed_forward(config: ModelConfig, stream: Stream) -> FeedForward | GatedFeedForward:
    """A block's feed-forward half: gated with `--swiglu`, else plain."""
    return GatedFeedForward(config, stream) if config.swiglu else FeedForward(config, stream)
