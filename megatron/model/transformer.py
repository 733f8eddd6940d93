"""One transformer block on flat packed tokens, and the stack of them.

Shapes: t tokens, u tokens of the residual stream on this rank (t, or fewer with sequence parallelism), h hidden, n
heads of this rank, d head width. Arithmetic as in Megatron-LM v2: LayerNorm before each half, rows of the fused
projection grouped by head as query, key, value: so a slice of its rows is the projection of some heads.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron.config import ModelConfig
from megatron.kernels.packed_sequence import PackedSequence
from megatron.model.initialisation import normal, residual_output
from megatron.parallel.context import context_attention
from megatron.parallel.mesh import Axis
from megatron.parallel.pipeline.partition import Stage
from megatron.parallel.randomness import distinct_randomness, rate_of
from megatron.parallel.recomputation import recomputed
from megatron.parallel.tensor.layers import ColumnParallelLinear, LayerNorm, RowParallelLinear
from megatron.parallel.tensor.stream import Stream


class Attention(nn.Module):
    """Self-attention inside each protein, the heads split over the tensor axis: [u, h] to [u, h]."""

    def __init__(self, config: ModelConfig, stream: Stream) -> None:
        super().__init__()
        self.axis, self.context, self.dropout = stream.axis, stream.context, config.attention_dropout
        self.recomputes_core = config.recompute_granularity == "selective"
        self.num_heads, self.head_width = config.num_attention_heads // stream.axis.size, config.kv_channels
        width = config.num_attention_heads * config.kv_channels
        self.query_key_value = ColumnParallelLinear(config.hidden_size, 3 * width, stream, normal(config))
        self.dense = RowParallelLinear(width, config.hidden_size, stream, residual_output(config))

    def forward(self, hidden_uh: Tensor, sequence: PackedSequence) -> Tensor:
        """[u, h]."""
        # The projection's rows are [n, 3, d]; the kernel wants [t, n, 3, d]: the same memory.
        qkv_tn3d = self.query_key_value(hidden_uh).view(-1, self.num_heads, 3, self.head_width)
        dropout = rate_of(self)
        with distinct_randomness(self.axis, dropout, hidden_uh.device):
            if self.recomputes_core and torch.is_grad_enabled():
                context_tnd = recomputed(lambda qkv_tn3d: context_attention(qkv_tn3d, sequence, dropout, self.context),
                                         qkv_tn3d, has_dropout=dropout > 0)
            else:
                context_tnd = context_attention(qkv_tn3d, sequence, dropout, self.context)
        return self.dense(context_tnd.flatten(1))


class FeedForward(nn.Module):
    """Two linear layers with a GeLU between, its width split over the tensor axis: [u, h] to [u, h]."""

    def __init__(self, config: ModelConfig, stream: Stream) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.ffn_hidden_size
        self.dense_h_to_4h = ColumnParallelLinear(hidden, width, stream, normal(config))
        self.dense_4h_to_h = RowParallelLinear(width, hidden, stream, residual_output(config))
        self.gelu_form = "tanh" if config.bias_gelu_fusion or config.openai_gelu else "none"

    def forward(self, hidden_uh: Tensor) -> Tensor:
        """[u, h]."""
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(hidden_uh), approximate=self.gelu_form))


class Block(nn.Module):
    """Attention and feed-forward, each behind a LayerNorm and added to the residual stream.

    The residual stream keeps the dtype in which it comes; the two branches compute in `dtype`.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, stream: Stream) -> None:
        super().__init__()
        self.input_layernorm = LayerNorm(config.hidden_size, config.layernorm_epsilon, stream)
        self.attention = Attention(config, stream)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, config.layernorm_epsilon, stream)
        self.mlp = FeedForward(config, stream)
        self.stream, self.dropout, self.dtype = stream, config.hidden_dropout, dtype
        self.residual_after_layernorm = config.apply_residual_connection_post_layernorm

    def forward(self, hidden_uh: Tensor, sequence: PackedSequence) -> Tensor:
        """[u, h]."""
        normed_uh = self.input_layernorm(hidden_uh)
        residual_uh = normed_uh if self.residual_after_layernorm else hidden_uh
        hidden_uh = self._add(residual_uh, self.attention(normed_uh.to(self.dtype), sequence))
        normed_uh = self.post_attention_layernorm(hidden_uh)
        residual_uh = normed_uh if self.residual_after_layernorm else hidden_uh
        return self._add(residual_uh, self.mlp(normed_uh.to(self.dtype)))

    def _add(self, residual_uh: Tensor, branch_uh: Tensor) -> Tensor:
        return residual_uh + self.stream.dropout(branch_uh, rate_of(self))


class Transformer(nn.Module):
    """The blocks of one pipeline stage, named by their numbers in the whole model, and behind the last the LayerNorm.

    [u, h] to [u, h], after the LayerNorm in `dtype`.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, stream: Stream, stage: Stage) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(number): Block(config, dtype, stream) for number in stage.layers})
        if stage.is_last:
            self.final_layernorm = LayerNorm(config.hidden_size, config.layernorm_epsilon, stream)
        self.is_last, self.dtype = stage.is_last, dtype
        self.layers_a_checkpoint = config.checkpoint_num_layers if config.checkpoint_activations else None
        self.kept_over = stream.axis if config.distribute_checkpointed_activations else Axis()
        self.has_dropout = config.attention_dropout > 0 or config.hidden_dropout > 0

    def forward(self, hidden_uh: Tensor, sequence: PackedSequence) -> Tensor:
        """[u, h]."""
        step = self.layers_a_checkpoint
        blocks = list(self.layers.values())
        if step is None or not torch.is_grad_enabled():
            hidden_uh = _run(blocks, sequence, hidden_uh)
        else:
            for start in range(0, len(blocks), step):
                hidden_uh = recomputed(partial(_run, blocks[start:start + step], sequence), hidden_uh,
                                       has_dropout=self.has_dropout, kept_over=self.kept_over)
        return self.final_layernorm(hidden_uh).to(self.dtype) if self.is_last else hidden_uh


def _run(blocks: Sequence[nn.Module], sequence: PackedSequence, hidden_uh: Tensor) -> Tensor:
    for block in blocks:
        hidden_uh = block(hidden_uh, sequence)
    return hidden_uh
