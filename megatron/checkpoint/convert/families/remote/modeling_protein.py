"""A masked language model of proteins in plain PyTorch, for a padded batch; it computes what the training program does.

Parameters have the training program's names. Shapes: b proteins, s positions, h hidden, v vocabulary, n heads in g
groups of q, each group with c = q + 2 rows (its queries, its key, its value) of width d; r rotary columns of a head.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from .configuration_protein import ProteinConfig

Rotation = tuple[Tensor, Tensor] | None  # cosines and sines, fp32 [b, s, 1, 1, r/2]
_ESM_MASKED_SHARE = 0.15 * 0.8  # the share of residues replaced by the mask in ESM's training


class ProteinForMaskedLM(PreTrainedModel):
    """The model: logits over the vocabulary at each position, and the loss if labels are given (-100: no target)."""

    config_class = ProteinConfig
    base_model_prefix = ""
    main_input_name = "input_ids"

    def __init__(self, config: ProteinConfig) -> None:
        super().__init__(config)
        self.embedding = Embedding(config)
        self.transformer = Transformer(config)
        self.lm_head = Head(config)
        if config.contact_head:
            self.contact_head = nn.Linear(config.num_layers * config.num_attention_heads, 1)  # saved, not used
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
                output_hidden_states: bool = False, return_dict: bool = True, **unused: Any) -> MaskedLMOutput:
        """Logits [b, s, v] for `input_ids` [b, s]; the last of the hidden states is after the final normalisation."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        is_token_bs = attention_mask.bool()
        positions_bs = (is_token_bs.long().cumsum(1) - 1).clamp(min=0)
        hidden_bsh = self.embedding(input_ids, positions_bs, is_token_bs)
        states = self.transformer(hidden_bsh, input_ids, positions_bs, is_token_bs)
        logits_bsv = self.lm_head(states[-1], self.embedding.word_embeddings.weight)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_bsv.flatten(0, 1).float(), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits_bsv, hidden_states=states if output_hidden_states else None)

    def get_input_embeddings(self) -> nn.Module:
        """The word embedding."""
        return self.embedding.word_embeddings

    def get_output_embeddings(self) -> None:
        """None, since a tied output layer uses the word embedding itself, so that there is nothing to tie."""
        return

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1:
                parameter.normal_(std=self.config.init_method_std)
            elif "bias" in name:
                parameter.zero_()
            else:
                parameter.fill_(1.0)


class Embedding(nn.Module):
    """Word embeddings, plus learned position embeddings if the model has them."""

    def __init__(self, config: ProteinConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding_type == "learned_absolute":
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layernorm = _norm(config) if config.embedding_layernorm else nn.Identity()
        self.config = config

    def forward(self, tokens_bs: Tensor, positions_bs: Tensor, is_token_bs: Tensor) -> Tensor:
        """The embeddings [b, s, h]."""
        hidden_bsh = self.word_embeddings(tokens_bs)
        if self.config.token_dropout:
            is_mask_bs = (tokens_bs == self.config.mask_token_id) & is_token_bs
            num_tokens_b1 = is_token_bs.sum(1, keepdim=True)
            num_seen_b1 = (num_tokens_b1 - is_mask_bs.sum(1, keepdim=True)).clamp(min=1)
            scales_b1 = (1 - _ESM_MASKED_SHARE) * num_tokens_b1.float() / num_seen_b1
            hidden_bsh = hidden_bsh * (scales_b1 * ~is_mask_bs).unsqueeze(-1).to(hidden_bsh.dtype)
        if self.config.position_embedding_type == "learned_absolute":
            hidden_bsh = hidden_bsh + self.position_embeddings(positions_bs)
        return F.dropout(self.layernorm(hidden_bsh), self.config.hidden_dropout, self.training)


class Transformer(nn.Module):
    """The blocks, and a final normalisation unless each block ends with one (norm_placement "post")."""

    def __init__(self, config: ProteinConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config, number) for number in range(config.num_layers))
        self.final_layernorm = nn.Identity() if config.norm_placement == "post" else _norm(config)
        self.config = config

    def forward(self, hidden_bsh: Tensor, tokens_bs: Tensor, positions_bs: Tensor,
                is_token_bs: Tensor) -> tuple[Tensor, ...]:
        """The hidden states [b, s, h] before each block, and after the final normalisation."""
        rotation, x0_bsh, states = _rotation(self.config, positions_bs), hidden_bsh, []
        skips: list[Tensor] = []
        for block in self.layers:
            states.append(hidden_bsh)
            skip_bsh = skips.pop() if block.takes_skip else None
            hidden_bsh = block(hidden_bsh, x0_bsh, skip_bsh, tokens_bs, positions_bs, is_token_bs, rotation)
            if block.gives_skip:
                skips.append(hidden_bsh)
        return (*states, self.final_layernorm(hidden_bsh))


class Block(nn.Module):
    """Attention and feed-forward, each added to the residual stream, with normalisation before, after, or both."""

    def __init__(self, config: ProteinConfig, number: int) -> None:
        super().__init__()
        is_before, is_behind = config.norm_placement != "post", config.norm_placement != "pre"
        self.input_layernorm = _norm(config) if is_before else nn.Identity()
        self.attention = Attention(config, number)
        self.attention_output_layernorm = _norm(config) if is_behind else nn.Identity()
        self.post_attention_layernorm = _norm(config) if is_before else nn.Identity()
        self.mlp = FeedForward(config)
        self.mlp_output_layernorm = _norm(config) if is_behind else nn.Identity()
        half = config.num_layers // 2
        self.gives_skip = config.unet_skips and number < half
        self.takes_skip = config.unet_skips and number >= config.num_layers - half
        if config.x0_skips:
            self.hidden_scale, self.x0_scale = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
        if self.takes_skip:
            self.skip_scale = nn.Parameter(torch.ones(1))
        self.config = config

    def forward(self, hidden_bsh: Tensor, x0_bsh: Tensor, skip_bsh: Tensor | None, *about: Any) -> Tensor:
        """The hidden states [b, s, h] after the block; `about`: further arguments of `Attention.forward`."""
        if self.config.x0_skips:
            hidden_bsh = self.hidden_scale * hidden_bsh + self.x0_scale * x0_bsh
        if skip_bsh is not None:
            hidden_bsh = hidden_bsh + self.skip_scale * skip_bsh
        hidden_bsh = self._add(hidden_bsh, lambda x_bsh: self.attention(x_bsh, *about), self.input_layernorm,
                               self.attention_output_layernorm)
        return self._add(hidden_bsh, self.mlp, self.post_attention_layernorm, self.mlp_output_layernorm)

    def _add(self, hidden_bsh: Tensor, layer: Callable[[Tensor], Tensor], before: nn.Module,
             behind: nn.Module) -> Tensor:
        normed_bsh = before(hidden_bsh)
        residual_bsh = normed_bsh if self.config.apply_residual_connection_post_layernorm else hidden_bsh
        branch_bsh = layer(normed_bsh)
        if self.config.norm_placement == "both":
            branch_bsh = behind(branch_bsh)
        sum_bsh = residual_bsh + F.dropout(branch_bsh, self.config.hidden_dropout, self.training)
        return behind(sum_bsh) if self.config.norm_placement == "post" else sum_bsh


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


class FeedForward(nn.Module):
    """Two linear layers with GeLU, squared ReLU or a SiLU gate between them."""

    def __init__(self, config: ProteinConfig) -> None:
        super().__init__()
        has_bias = not config.disable_bias_linear
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.ffn_hidden_size, has_bias)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, has_bias)
        if config.swiglu:
            self.gate = nn.Linear(config.hidden_size, config.ffn_hidden_size, has_bias)
        self.config = config

    def forward(self, hidden_bsh: Tensor) -> Tensor:
        """The output, in the shape of `hidden_bsh`."""
        wide = self.dense_h_to_4h(hidden_bsh)
        if self.config.swiglu:
            wide = F.silu(self.gate(hidden_bsh)) * wide
        elif self.config.squared_relu:
            wide = F.relu(wide).square()
        else:
            is_tanh = self.config.bias_gelu_fusion or self.config.openai_gelu
            wide = F.gelu(wide, approximate="tanh" if is_tanh else "none")
        return self.dense_4h_to_h(wide)


class Head(nn.Module):
    """The masked-LM head: dense, exact GeLU, normalisation, then the output matrix (tied or its own) and a bias."""

    def __init__(self, config: ProteinConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, not config.disable_bias_linear)
        self.layernorm = _norm(config)
        if config.untie_embeddings_and_output_weights:
            self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.config = config

    def forward(self, hidden_bsh: Tensor, word_embeddings_vh: Tensor) -> Tensor:
        """Logits [b, s, v]."""
        matrix_vh = self.decoder.weight if self.config.untie_embeddings_and_output_weights else word_embeddings_vh
        logits_bsv = F.linear(self.layernorm(F.gelu(self.dense(hidden_bsh))), matrix_vh, self.bias)
        cap = self.config.final_logit_softcapping
        return logits_bsv if cap is None else cap * torch.tanh(logits_bsv.float() / cap)


def _norm(config: ProteinConfig) -> nn.Module:
    kind = nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.layernorm_epsilon)


def _groups(config: ProteinConfig) -> int:
    return config.num_query_groups or config.num_attention_heads


def _rotation(config: ProteinConfig, positions_bs: Tensor) -> Rotation:
    """Cosines and sines of the rotary angles; None without rotary positions."""
    if config.position_embedding_type != "rope":
        return None
    width = int(config.kv_channels * config.rotary_percent) // 2 * 2
    places = torch.arange(0, width, 2, dtype=torch.float32, device=positions_bs.device)
    rounded = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[config.rotary_frequency_precision]
    frequencies = (1.0 / config.rotary_base ** (places / width)).to(rounded).float()
    angles = positions_bs.float()[:, :, None, None, None] * frequencies
    return angles.cos(), angles.sin()


def _rotate(x_bsgqd: Tensor, rotation: Rotation) -> Tensor:
    """Rotary positions applied to the first r columns of each head: column i is paired with column i + r/2."""
    if rotation is None:
        return x_bsgqd
    cos, sin = rotation
    half = cos.shape[-1]
    first, second, rest = x_bsgqd.float().split([half, half, x_bsgqd.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x_bsgqd.dtype)
