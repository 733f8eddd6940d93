"""One transformer block on flat packed tokens, and the stack of them.

Shapes: t tokens, h hidden, n heads, d head width, f feed-forward width. Arithmetic as in Megatron-LM v2:
LayerNorm before each half, rows of the fused projection grouped by head as query, key, value.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megatron.config import ModelConfig
from megatron.kernels.attention import Boundaries, packed_attention
from megatron.parallel.layers import LayerNorm, Linear


class Attention(nn.Module):
    """Self-attention inside each protein: [t, h] to [t, h]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.head_width = config.num_attention_heads, config.kv_channels
        self.dropout = config.attention_dropout
        width = self.num_heads * self.head_width
        self.query_key_value = Linear(config.hidden_size, 3 * width)
        self.dense = Linear(width, config.hidden_size)

    def forward(self, hidden_th: Tensor, boundaries: Boundaries) -> Tensor:
        """[t, h]."""
        qkv = self.query_key_value(hidden_th).view(-1, self.num_heads, 3, self.head_width)
        # The projection's rows are [n, 3, d]; the kernel wants [t, n, 3, d]: the same memory.
        context_tnd = packed_attention(qkv, boundaries, self.dropout if self.training else 0.0)
        return self.dense(context_tnd.flatten(1))


class FeedForward(nn.Module):
    """Two linear layers with a GeLU between: [t, h] to [t, h]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = Linear(config.hidden_size, config.ffn_hidden_size)
        self.dense_4h_to_h = Linear(config.ffn_hidden_size, config.hidden_size)
        self.gelu_form = "tanh" if config.bias_gelu_fusion or config.openai_gelu else "none"

    def forward(self, hidden_th: Tensor) -> Tensor:
        """[t, h]."""
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(hidden_th), approximate=self.gelu_form))


class Block(nn.Module):
    """Attention and feed-forward, each behind a LayerNorm and added to the residual stream.

    The residual stream keeps the dtype in which it comes; the two branches compute in `dtype`.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_layernorm = LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.attention = Attention(config)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = FeedForward(config)
        self.dropout, self.dtype = config.hidden_dropout, dtype
        self.residual_after_layernorm = config.apply_residual_connection_post_layernorm

    def forward(self, hidden_th: Tensor, boundaries: Boundaries) -> Tensor:
        """[t, h]."""
        normed_th = self.input_layernorm(hidden_th)
        residual_th = normed_th if self.residual_after_layernorm else hidden_th
        hidden_th = self._add(residual_th, self.attention(normed_th.to(self.dtype), boundaries))
        normed_th = self.post_attention_layernorm(hidden_th)
        residual_th = normed_th if self.residual_after_layernorm else hidden_th
        return self._add(residual_th, self.mlp(normed_th.to(self.dtype)))

    def _add(self, residual_th: Tensor, branch_th: Tensor) -> Tensor:
        return residual_th + F.dropout(branch_th, self.dropout, self.training)


class Transformer(nn.Module):
    """The stack of blocks and the LayerNorm behind it: [t, h] to [t, h] in `dtype`."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config, dtype) for _ in range(config.num_layers))
        self.final_layernorm = LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.dtype = dtype
        self.layers_a_checkpoint = config.checkpoint_num_layers if config.checkpoint_activations else None
        self.has_dropout = config.attention_dropout > 0 or config.hidden_dropout > 0

    def forward(self, hidden_th: Tensor, boundaries: Boundaries) -> Tensor:
        """[t, h]."""
        step = self.layers_a_checkpoint if self.training and self.layers_a_checkpoint else None
        if step is None:
            hidden_th = self._run(0, len(self.layers), hidden_th, boundaries)
        else:
            for start in range(0, len(self.layers), step):
                hidden_th = checkpoint(self._run, start, start + step, hidden_th, boundaries, use_reentrant=False,
                                       preserve_rng_state=self.has_dropout)
        return self.final_layernorm(hidden_th).to(self.dtype)

    def _run(self, start: int, stop: int, hidden_th: Tensor, boundaries: Boundaries) -> Tensor:
        for block in self.layers[start:stop]:
            hidden_th = block(hidden_th, boundaries)
        return hidden_th
