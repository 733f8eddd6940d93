"""The flags of the model: its shape and its arithmetic."""

from dataclasses import dataclass

from megatron.config.declaration import flag, fraction, positive


@dataclass(frozen=True)
class ModelConfig:
    """The transformer's shape and arithmetic."""

    num_layers: int = flag(12, "transformer blocks", kind=int, check=positive, changes="arithmetic")
    hidden_size: int = flag(768, "width of the residual stream", kind=int, check=positive, changes="arithmetic")
    ffn_hidden_size: int = flag(None, "width of the feed-forward layer (default: 4 x hidden size)", kind=int,
                                check=positive, changes="arithmetic")
    num_attention_heads: int = flag(12, "attention heads", kind=int, check=positive, changes="arithmetic")
    kv_channels: int = flag(None, "width of one head (default: hidden size / heads)", kind=int, check=positive,
                            changes="arithmetic")
    max_position_embeddings: int = flag(None, "learned positions (default: sequence length)", kind=int, check=positive,
                                        changes="arithmetic")
    make_vocab_size_divisible_by: int = flag(128, "pad the vocabulary to a multiple of this per tensor-parallel rank",
                                             kind=int, check=positive, changes="arithmetic")
    layernorm_epsilon: float = flag(1e-5, "epsilon of the LayerNorms", kind=float, check=positive, changes="arithmetic")
    apply_residual_connection_post_layernorm: bool = flag(
        False, "take the residual from after the LayerNorm (original BERT) instead of before it", changes="arithmetic")
    attention_dropout: float = flag(0.1, "dropout of attention probabilities", kind=float, check=fraction,
                                    changes="course")
    hidden_dropout: float = flag(0.1, "dropout of embeddings and of each block's two outputs", kind=float,
                                 check=fraction, changes="course")
    init_method_std: float = flag(0.02, "standard deviation of the initial weights", kind=float, check=positive,
                                  changes="nothing")
    bias_gelu_fusion: bool = flag(True, "tanh form of GeLU in the blocks, as Megatron's fused kernel has it; "
                                  "without it the exact form", changes="arithmetic")
    openai_gelu: bool = flag(False, "tanh form of GeLU in the blocks, whatever --no-bias-gelu-fusion says",
                             changes="arithmetic")
    fp32_residual_connection: bool = flag(False, "keep the residual stream in fp32 under --fp16 or --bf16",
                                          changes="course")
    checkpoint_activations: bool = flag(False, "recompute each block's activations in the backward pass",
                                        aliases=("--recompute-activations",), changes="nothing")
    checkpoint_num_layers: int = flag(1, "blocks between two checkpointed activations", kind=int, check=positive,
                                      changes="nothing")
    distribute_checkpointed_activations: bool = flag(
        False, "share checkpointed activations out among the tensor-parallel ranks", changes="nothing")
    recompute_granularity: str = flag(
        None, "selective: recompute attention's core alone; full: --checkpoint-activations",
        choices=("selective", "full"), changes="nothing")
