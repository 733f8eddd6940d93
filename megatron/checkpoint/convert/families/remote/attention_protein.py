"""Attention of the protein language model in this folder, with what may act on its queries, keys and values.

Shapes as in `modeling_protein`; n heads in g groups of q, each group with c = q + 2 rows (its queries, its key, its
value) of width d; r rotary columns of a head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_protein import ProteinConfig

Rotation = tuple[Tensor, Tensor] | None  # cosines and sines, fp32 [b, s, 1, 1, r/2]


def rotation_of(config: ProteinConfig, positions_bs: Tensor) -> Rotation:
    """Cosines and sines of the rotary angles; None without rotary positions."""
    if config.position_embedding_type != "rope":
        return None
    width = int(config.kv_channels * config.rotary_percent) // 2 * 2
    places = torch.arange(0, width, 2, dtype=torch.float32, device=positions_bs.device)
    rounded = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[config.rotary_frequency_precision]
    frequencies = (1.0 / config.rotary_base ** (places / width)).to(rounded).float()
    angles = positions_bs.float()[:, :, None, None, None] * frequencies
    return angles.cos(), angles.sin()


class Attention(nn.Module):
    """Self-attention; the heads of a group share a key and a value."""

    def __init__(self, config: ProteinConfig, number: int) -> None:
        super().__init__()
        heads, groups, width = config.num_attention_heads, _groups(config), config.kv_channels
        rows, has_bias = (heads + 2 * groups) * width, not config.disable_bias_linear
        self.query_key_value = nn.Linear(config.hidden_size, rows, has_bias)
        self.dense = nn.Linear(heads * width, config.hidden_size, has_bias)
        if config.qkv_conv_kernel:
            self.conv = ShortConvolution(rows, config.qkv_conv_kernel)
        if config.value_embeddings:
            self.values = ValueEmbedding(config)
        if config.qk_layernorm:
            self.query_norm, self.key_norm = HeadNorm(config, heads), HeadNorm(config, groups)
        sees_all = config.window_attn_skip_freq and (number + 1) % config.window_attn_skip_freq == 0
        self.window = None if sees_all else config.window_size
        self.config = config

    def forward(self, hidden_bsh: Tensor, tokens_bs: Tensor, positions_bs: Tensor, is_token_bs: Tensor,
                rotation: Rotation) -> Tensor:
        """The output [b, s, h]; padding is not attended to."""
        qkv_bsx = self.query_key_value(hidden_bsh)
        if self.config.qkv_conv_kernel:
            qkv_bsx = self.conv(qkv_bsx, is_token_bs)
        qkv_bsgcd = qkv_bsx.unflatten(-1, (_groups(self.config), -1, self.config.kv_channels))
        query_bsgqd, key_bsg1d, value_bsg1d = qkv_bsgcd.split([qkv_bsgcd.shape[3] - 2, 1, 1], dim=3)
        if self.config.value_embeddings:
            value_bsg1d = self.values(value_bsg1d, tokens_bs)
        if self.config.qk_layernorm:
            query_bsgqd, key_bsg1d = self.query_norm(query_bsgqd), self.key_norm(key_bsg1d)
        query_bsgqd, key_bsg1d = _rotate(query_bsgqd, rotation), _rotate(key_bsg1d, rotation)
        query_bnsd, key_bnsd, value_bnsd = (x.expand_as(query_bsgqd).flatten(2, 3).transpose(1, 2)
                                            for x in (query_bsgqd, key_bsg1d, value_bsg1d))
        is_seen_bsk = is_token_bs[:, None, :].expand(-1, is_token_bs.shape[1], -1)
        if self.window is not None:
            to_right_bsk = positions_bs[:, None, :] - positions_bs[:, :, None]
            is_seen_bsk = is_seen_bsk & (to_right_bsk >= -self.window[0]) & (to_right_bsk <= self.window[1])
        is_seen_bsk = is_seen_bsk | ~is_token_bs[:, :, None]  # padding attends to all, to avoid NaN
        dropout = self.config.attention_dropout if self.training else 0.0
        context_bnsd = F.scaled_dot_product_attention(query_bnsd, key_bnsd, value_bnsd, is_seen_bsk[:, None], dropout)
        return self.dense(context_bnsd.transpose(1, 2).flatten(2))


class HeadNorm(nn.Module):
    """Normalises each head over its width, with its own scales."""

    def __init__(self, config: ProteinConfig, num_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_heads * config.kv_channels))
        self.normalise = F.rms_norm if config.normalization == "RMSNorm" else F.layer_norm
        self.epsilon = config.layernorm_epsilon

    def forward(self, x_bsgqd: Tensor) -> Tensor:
        """The normalised `x_bsgqd`, in the same shape."""
        return self.normalise(x_bsgqd, x_bsgqd.shape[-1:], eps=self.epsilon) * self.weight.view(x_bsgqd.shape[2:])


class ValueEmbedding(nn.Module):
    """Mixes an embedding of the token into the values of attention."""

    def __init__(self, config: ProteinConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.vocab_size, _groups(config) * config.kv_channels))
        self.scales = nn.Parameter(torch.full((2,), 0.5))

    def forward(self, value_bsg1d: Tensor, tokens_bs: Tensor) -> Tensor:
        """The mixed values, in the same shape."""
        own, embedded = self.scales.unbind()
        return own * value_bsg1d + embedded * F.embedding(tokens_bs, self.weight).view_as(value_bsg1d)


class ShortConvolution(nn.Module):
    """x + a depthwise convolution of x over neighbouring tokens of the protein."""

    def __init__(self, num_features: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_features, kernel))

    def forward(self, x_bsx: Tensor, is_token_bs: Tensor) -> Tensor:
        """The result, in the shape of `x_bsx`."""
        halo, size = self.weight.shape[1] // 2, x_bsx.shape[1]
        around = F.pad(x_bsx * is_token_bs.unsqueeze(-1), (0, 0, halo, halo))
        return x_bsx + sum(around[:, place:place + size] * weight for place, weight in enumerate(self.weight.unbind(1)))


def _groups(config: ProteinConfig) -> int:
    return config.num_query_groups or config.num_attention_heads


def _rotate(x_bsgqd: Tensor, rotation: Rotation) -> Tensor:
    """Rotary positions applied to the first r columns of each head: column i is paired with column i + r/2."""
    if rotation is None:
        return x_bsgqd
    cos, sin = rotation
    half = cos.shape[-1]
    first, second, rest = x_bsgqd.float().split([half, half, x_bsgqd.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x_bsgqd.dtype)
