"""Counts the FLOPs of a micro-batch of packed proteins: what the model needs, whatever the implementation does."""

from functools import cache

import torch

from megatron.config import ModelConfig, PrecisionConfig
from megatron.model.protein_model import ProteinModel


def model_flops(config: ModelConfig, padded_vocab_size: int, num_tokens: int, num_pairs: int, num_targets: int) -> int:
    """Floating-point operations of one forward and backward pass over proteins of `num_tokens` tokens in total.

    `num_pairs`: pairs of tokens that attend to each other, the sum of the squares of the proteins' numbers of tokens;
    an attention window leaves each token at most as many pairs as it is wide. Counted are matrix products alone, a
    multiplication and an addition as two operations, the backward pass as two forward passes, recomputation not at all
    (the model FLOPs of Narayanan et al., 2021, arXiv 2104.04473, with each protein's own length).
    """
    blocks, head = _multiplied(config, padded_vocab_size)
    windows = (config.window(block) for block in range(config.num_layers))
    pairs = sum(num_pairs if window is None else min(num_pairs, num_tokens * (sum(window) + 1)) for window in windows)
    return 6 * (blocks * num_tokens + head * num_targets + 2 * config.num_attention_heads * config.kv_channels * pairs)


@cache
def _multiplied(config: ModelConfig, padded_vocab_size: int) -> tuple[int, int]:
    """The number of weights that each token is multiplied with (in the blocks), and each target (in the head)."""
    with torch.device("meta"):
        model = ProteinModel(config, PrecisionConfig(), padded_vocab_size, mask_id=0)
    in_blocks = {id(module) for module in model.transformer.modules()}
    sizes = [(id(layer) in in_blocks, layer.weight.numel()) for layer in model.matrices()]
    return sum(size for is_block, size in sizes if is_block), sum(size for is_block, size in sizes if not is_block)
