"""Self-attention inside each protein, with what may be done to queries, keys and values before.

Shapes: t tokens, u tokens of the residual stream on this rank (t, or fewer with sequence parallelism), h hidden, n
heads in g groups of q (of this rank), d head width. Rows of the fused projection are grouped as in Megatron-LM: a
group's queries, its key, its value, c = q + 2 of them; so a slice of its rows is the projection of some groups.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron.config import ModelConfig
from megatron.kernels.attention.maps import attention_with_maps
from megatron.kernels.device import takes_triton
from megatron.kernels.dropout import Dropout, Use
from megatron.kernels.packed_sequence import PackedSequence
from megatron.kernels.pointwise.convolution import convolved
from megatron.kernels.pointwise.heads import Heads, HeadScaling, prepared_heads
from megatron.kernels.pointwise.product import Product
from megatron.kernels.rotary import Rotation
from megatron.model.initialisation import normal, residual_output
from megatron.model.normalisation import HeadNorm
from megatron.parallel.context import context_attention, takes_parts, with_neighbours
from megatron.parallel.parameters import Constant, Declaration, replicated_parameter, split_parameter, table
from megatron.parallel.randomness import dropout_of
from megatron.parallel.recomputation import recomputed
from megatron.parallel.tensor.layers import ColumnParallelLinear, RowParallelLinear
from megatron.parallel.tensor.stream import Stream

Summing = Literal["projection", "convolution", "rotation"]


class Attention(nn.Module):
    """Block `number`'s self-attention, the heads split over the tensor axis: [u, h] to [u, h]."""

    def __init__(self, config: ModelConfig, number: int, num_ids: int, stream: Stream) -> None:
        super().__init__()
        self.context, self.dropout = stream.context, config.attention_dropout
        self.recomputes_core = config.recompute_granularity == "selective"
        self.takes_maps: Callable[[Iterator[Tensor]], None] | None = None  # what wants each protein's map, if anything
        self.window, self.backend = config.window(number), config.attention_backend
        heads, groups, head_width = config.num_attention_heads, config.num_groups, config.kv_channels
        self.shape = groups // stream.axis.size, heads // groups + 2, head_width
        self.first_head = stream.axis.rank * heads // stream.axis.size
        width, has_bias = heads * head_width, not config.disable_bias_linear
        rows = (heads + 2 * groups) * head_width
        runs = (heads // groups * head_width, head_width, head_width)
        self.query_key_value = ColumnParallelLinear(config.hidden_size, rows, stream, normal(config), has_bias, runs)
        self.dense = RowParallelLinear(width, config.hidden_size, stream, residual_output(config), has_bias)
        self.conv = ShortConvolution(rows, config.qkv_conv_kernel, stream) if config.qkv_conv_kernel else None
        self.values = ValueEmbedding(config, num_ids, stream) if config.value_embeddings else None
        if config.qk_layernorm:
            self.query_norm = HeadNorm(config, heads, stream.axis)
            self.key_norm = HeadNorm(config, groups, stream.axis)
        self.has_qk_norm, self.epsilon = config.qk_layernorm, config.layernorm_epsilon
        self.is_rms = config.normalization == "RMSNorm"

    def forward(self, hidden_uh: Tensor, sequence: PackedSequence, rotation: Rotation | None) -> Product:
        """[u, h], perhaps still without the last bias; `rotation`: of queries and keys, if they are to be rotated."""
        projection, sums_bias = self.query_key_value, self._sums_bias_gradient(hidden_uh, rotation)
        qkv_tx = projection(hidden_uh, trains_bias=sums_bias == "projection")
        if self.conv is not None:
            qkv_tx = self.conv(qkv_tx, sequence, projection.bias if sums_bias == "convolution" else None)
        qkv_tgcd = qkv_tx.view(-1, *self.shape)
        if self.values is not None:
            qkv_tgcd = self.values(qkv_tgcd, sequence.tokens_t)
        dropout = dropout_of(self, sequence, Use.PROBABILITIES, self.first_head)
        is_apart = self.takes_maps is None and takes_parts(qkv_tgcd, dropout is not None, self.context, self.window,
                                                           self.backend)
        # May overwrite the projection, which nothing above has kept for the backward pass.
        heads = prepared_heads(qkv_tgcd, self._head_scaling(), rotation,
                               projection.bias if sums_bias == "rotation" else None, is_apart)
        return self.dense.product(self._core(heads, sequence, dropout).flatten(1))

    def _sums_bias_gradient(self, x: Tensor, rotation: Rotation | None) -> Summing:
        """Which operation computes the gradient of the projection's bias: the sum over the tokens of its output's.

        The projection always adds the bias in its forward pass. The gradient of its output is written by the backward
        pass of whatever follows; if that is Triton's convolution, or its rotation without a norm, the same kernel sums
        it over the tokens as well.
        """
        if not takes_triton(x):
            return "projection"
        if self.conv is not None:
            return "convolution"
        is_rotated_next = rotation is not None and not self.has_qk_norm and self.values is None
        return "rotation" if is_rotated_next else "projection"

    def _head_scaling(self) -> HeadScaling | None:
        if not self.has_qk_norm:
            return None
        return HeadScaling(self.query_norm.weight, self.key_norm.weight, self.epsilon, self.is_rms)

    def _core(self, heads: Heads, sequence: PackedSequence, dropout: Dropout | None) -> Tensor:
        if self.takes_maps is not None:
            context_tnd, maps = attention_with_maps(heads[0], sequence, self.window)
            self.takes_maps(maps)
            return context_tnd

        def core(*heads: Tensor) -> Tensor:
            return context_attention(heads, sequence, dropout, self.context, self.window, self.backend)

        if self.recomputes_core and torch.is_grad_enabled():
            return recomputed(core, *heads)
        return core(*heads)


class ValueEmbedding(nn.Module):
    """Mixes into the values an embedding of the token: v becomes a·v + b·E[token], a and b learned, at first 1/2 each.

    As in the fastest recipes of small models (after Zhou et al., 2024, arXiv 2410.17897); a table a block.
    """

    def __init__(self, config: ModelConfig, num_ids: int, stream: Stream) -> None:
        super().__init__()
        width = config.num_groups * config.kv_channels
        self.weight = split_parameter((num_ids, width), 1, stream.axis, table(normal(config)))
        self.scales = replicated_parameter((2,), stream.axis, Declaration(Constant(0.5), "vector", decays=False),
                                           has_partial_gradient=True)

    def forward(self, qkv_tgcd: Tensor, tokens_t: Tensor) -> Tensor:
        """The same shape."""
        query_key_tgcd, value_tg1d = qkv_tgcd.split([qkv_tgcd.shape[2] - 1, 1], dim=2)
        own, embedded = self.scales.to(qkv_tgcd.dtype).unbind()
        embedded_tg1d = F.embedding(tokens_t, self.weight).to(qkv_tgcd.dtype).view_as(value_tg1d)
        return torch.cat([query_key_tgcd, own * value_tg1d + embedded * embedded_tg1d], dim=2)


class ShortConvolution(nn.Module):
    """x + a depthwise convolution of x over neighbouring tokens of the same protein, at first 0.

    Of queries, keys and values as in Primer (So et al., 2021, arXiv 2109.08668); here it looks to both sides.
    """

    def __init__(self, num_features: int, kernel: int, stream: Stream) -> None:
        super().__init__()
        self.context, self.halo = stream.context, kernel // 2
        self.weight = split_parameter((num_features, kernel), 0, stream.axis,
                                      Declaration(Constant(0.0), "vector", decays=False))

    def forward(self, x_tf: Tensor, sequence: PackedSequence, added_bias_f: Tensor | None = None) -> Tensor:
        """The same shape; `added_bias_f`: a bias that `x_tf` contains, if its gradient is to be computed here.

        Over a context axis each rank computes the part of that gradient that comes from its own outputs.
        """
        around_tf, positions = (with_neighbours(each, self.halo, self.context) for each in (x_tf, sequence.positions_t))
        out_tf = convolved(around_tf, positions, self.weight, added_bias_f)
        num_before = (len(around_tf) - len(x_tf)) // 2
        # Backward a view costs a tensor of zeros and a copy.
        return out_tf.narrow(0, num_before, len(x_tf)) if num_before else out_tf
