"""How much arithmetic a micro-batch of packed proteins is, counted on the model and not on the implementation."""

from megatron.config import ModelConfig


def model_flops(config: ModelConfig, padded_vocab_size: int, num_tokens: int, num_pairs: int, num_targets: int) -> int:
    """Floating-point operations of one forward and backward pass over proteins of `num_tokens` tokens in all.

    `num_pairs`: tokens that see each other, the sum of the squares of the proteins' tokens.

    Matrix products only, a multiplication and an addition counted as two, backward as twice forward; recomputation is
    not counted (as in the model FLOPs of Narayanan et al., 2021, arXiv 2104.04473, with each protein's own length).
    """
    width = config.num_attention_heads * config.kv_channels
    weights = config.num_layers * config.hidden_size * (4 * width + 2 * config.ffn_hidden_size)
    head = config.hidden_size * (config.hidden_size + padded_vocab_size)
    scores = 2 * config.num_layers * width * num_pairs
    return 6 * (weights * num_tokens + head * num_targets + scores)
