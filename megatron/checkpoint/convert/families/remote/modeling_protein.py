"""A masked language model of proteins in plain PyTorch, for a padded batch; it computes what the training program does.

Parameters have the training program's names. Shapes: b proteins, s positions, h hidden, v vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from .attention_protein import Attention, ValueEmbedding, rotation_of
from .configuration_protein import ProteinConfig

_REFUSED = ("output_attentions", "inputs_embeds", "position_ids", "head_mask")  # what would be ignored otherwise
_ESM_MASKED_SHARE = 0.15 * 0.8  # the share of residues replaced by the mask in ESM's training


class ProteinForMaskedLM(PreTrainedModel):
    """The model: logits over the vocabulary at each position, and the loss if labels are given (-100: no target)."""

    config_class = ProteinConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    accepts_loss_kwargs = False  # the loss is a batch's mean, which Trainer divides by the batches that it accumulates

    def __init__(self, config: ProteinConfig) -> None:
        super().__init__(config)
        self.embedding = Embedding(config)
        self.transformer = Transformer(config)
        self.lm_head = Head(config)
        if config.contact_head:
            self.contact_head = nn.Linear(config.num_layers * config.num_attention_heads, 1)  # saved, not used
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
                output_hidden_states: bool | None = None, return_dict: bool | None = None,
                **unused: Any) -> MaskedLMOutput | tuple[Any, ...]:
        """Logits [b, s, v] for `input_ids` [b, s]; the last of the hidden states is after the final normalisation.

        Raises ValueError for what other models of transformers take and this one does not, such as output_attentions.
        """
        asked = {"output_attentions": self.config.output_attentions, **unused}
        for name in _REFUSED:
            if asked.get(name) is not None and asked[name] is not False:
                raise ValueError(f"ProteinForMaskedLM does not support {name}; leave it out")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
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
        output = MaskedLMOutput(loss=loss, logits=logits_bsv, hidden_states=states if output_hidden_states else None)
        return output.to_tuple() if return_dict is False else output

    def get_input_embeddings(self) -> nn.Embedding:
        """The word embedding."""
        return self.embedding.word_embeddings

    def set_input_embeddings(self, value: Any) -> None:
        """Replaces the word embedding."""
        self.embedding.word_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        """The layer whose weight is the output matrix: the word embedding if they are tied."""
        return self.lm_head.decoder if self.config.untie_embeddings_and_output_weights else self.get_input_embeddings()

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replaces that layer."""
        if self.config.untie_embeddings_and_output_weights:
            self.lm_head.decoder = new_embeddings
        else:
            self.set_input_embeddings(new_embeddings)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None,
                                mean_resizing: bool = True) -> nn.Embedding:
        """The word embedding, after the rows of all parameters that have one for each token were cut or added to.

        Arguments as of transformers' method. New rows of the output bias and of value embeddings are zero.
        """
        words = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        for module in self.modules():
            name = {Head: "bias", ValueEmbedding: "weight"}.get(type(module))
            if name is not None and (num_added := len(words.weight) - len(rows := getattr(module, name))):
                resized = F.pad(rows.data, (0, 0) * (rows.ndim - 1) + (0, num_added))
                setattr(module, name, nn.Parameter(resized, rows.requires_grad))
        return words

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
        self.gradient_checkpointing = False  # transformers sets it, and the function beside it
        self._gradient_checkpointing_func: Any = None
        self.config = config

    def forward(self, hidden_bsh: Tensor, tokens_bs: Tensor, positions_bs: Tensor,
                is_token_bs: Tensor) -> tuple[Tensor, ...]:
        """The hidden states [b, s, h] before each block, and after the final normalisation."""
        rotation, x0_bsh, states = rotation_of(self.config, positions_bs), hidden_bsh, []
        skips: list[Tensor] = []
        for block in self.layers:
            states.append(hidden_bsh)
            skip_bsh = skips.pop() if block.takes_skip else None
            is_recomputed = self.gradient_checkpointing and self.training
            run: Any = partial(self._gradient_checkpointing_func, block) if is_recomputed else block
            hidden_bsh = run(hidden_bsh, x0_bsh, skip_bsh, tokens_bs, positions_bs, is_token_bs, rotation)
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
