"""The flags of the model: its shape and its arithmetic."""

from dataclasses import dataclass

from megatron.config.declaration import flag, fraction, not_negative, positive

_ODD = (lambda v: v >= 3 and v % 2 == 1, "odd, 3 or greater")


@dataclass(frozen=True)
class ModelConfig:
    """The transformer's shape and arithmetic."""

    num_layers: int = flag(12, "transformer blocks", kind=int, check=positive, changes="arithmetic", common=True)
    hidden_size: int = flag(768, "width of the residual stream", kind=int, check=positive, changes="arithmetic",
                            common=True)
    ffn_hidden_size: int = flag(None, "width of the feed-forward layer (default: 4 x hidden size; with --swiglu two "
                                "thirds of it, in multiples of 64)", kind=int, check=positive, changes="arithmetic")
    num_attention_heads: int = flag(12, "attention heads", kind=int, check=positive, changes="arithmetic", common=True)
    kv_channels: int = flag(None, "width of one head (default: hidden size / heads)", kind=int, check=positive,
                            changes="arithmetic")
    group_query_attention: bool = flag(False, "let heads share keys and values in --num-query-groups groups",
                                       changes="nothing")
    num_query_groups: int = flag(None, "groups of heads, each with one key and value (default: as many as heads)",
                                 kind=int, check=positive, changes="arithmetic")
    position_embedding_type: str = flag("learned_absolute", "how positions are encoded: by a learned table, by "
                                        "rotating queries and keys, or not at all",
                                        choices=("learned_absolute", "rope", "none"), changes="arithmetic", common=True)
    max_position_embeddings: int = flag(None, "number of learned positions, if there are any (default: sequence "
                                        "length)", kind=int, check=positive, changes="arithmetic")
    rotary_base: float = flag(10000.0, "base of the wavelengths of --position-embedding-type rope", kind=float,
                              check=positive, changes="arithmetic")
    rotary_percent: float = flag(1.0, "share of a head's width that is rotated", kind=float,
                                 check=(lambda v: 0 < v <= 1, "above 0 and at most 1"), changes="arithmetic")
    rotary_frequency_precision: str = flag("fp32", "dtype to which the frequencies of --position-embedding-type rope "
                                           "are rounded; fp16 in the published ESM-2", choices=("fp32", "fp16", "bf16"),
                                           changes="arithmetic")
    window_size: tuple[int, ...] = flag(None, "LEFT RIGHT: number of residues on each side that a residue attends to",
                                        kind=int, nargs=2, check=not_negative, changes="arithmetic")
    window_attn_skip_freq: int = flag(None, "with --window-size, let every N-th block attend to the whole protein",
                                      kind=int, check=(lambda v: v >= 2, "2 or greater"), changes="arithmetic")
    make_vocab_size_divisible_by: int = flag(128, "pad the vocabulary to a multiple of this per tensor-parallel rank",
                                             kind=int, check=positive, changes="arithmetic")
    normalization: str = flag("LayerNorm", "kind of normalisation", choices=("LayerNorm", "RMSNorm"),
                              changes="arithmetic")
    norm_placement: str = flag(
        "pre", "where a block normalises: each branch's input, the sum with the residual (BERT), or each branch's "
        "input and output", choices=("pre", "post", "both"), changes="arithmetic")
    layernorm_epsilon: float = flag(1e-5, "epsilon of the normalisations", kind=float, check=positive,
                                    aliases=("--norm-epsilon",), changes="arithmetic")
    embedding_layernorm: bool = flag(False, "normalise the embeddings", changes="arithmetic")
    qk_layernorm: bool = flag(False, "normalise queries and keys, each head with its own scale", changes="arithmetic")
    apply_residual_connection_post_layernorm: bool = flag(
        False, "take the residual from after the LayerNorm instead of before it", changes="arithmetic")
    disable_bias_linear: bool = flag(False, "no biases in linear layers", changes="arithmetic")
    untie_embeddings_and_output_weights: bool = flag(False, "give the head its own matrix for the logits",
                                                     changes="arithmetic")
    token_dropout: bool = flag(False, "ESM's token dropout: embeddings of [MASK] are 0, and the others of a protein "
                               "are scaled by the share that is masked", changes="arithmetic")
    attention_dropout: float = flag(0.1, "dropout of attention probabilities", kind=float, check=fraction,
                                    changes="dropout")
    hidden_dropout: float = flag(0.1, "dropout of embeddings and of each block's two outputs", kind=float,
                                 check=fraction, changes="dropout")
    init_method_std: float = flag(0.02, "standard deviation of the initial weights", kind=float, check=positive,
                                  changes="nothing")
    zero_init_output: bool = flag(False, "initialise the last matrix of each branch to 0", changes="nothing")
    bias_gelu_fusion: bool = flag(True, "tanh form of GeLU in the blocks, like Megatron's fused kernel; without it the "
                                  "exact form", changes="arithmetic")
    openai_gelu: bool = flag(False, "tanh form of GeLU in the blocks, whatever --no-bias-gelu-fusion says",
                             changes="arithmetic")
    swiglu: bool = flag(False, "SwiGLU in place of GeLU", changes="arithmetic")
    squared_relu: bool = flag(False, "squared ReLU in place of GeLU", changes="arithmetic")
    value_embeddings: bool = flag(False, "mix an embedding of the token into each block's values", changes="arithmetic")
    x0_skips: bool = flag(False, "mix the embeddings into each block's input", changes="arithmetic")
    unet_skips: bool = flag(False, "add the outputs of the first half's blocks to the inputs of the second half's, the "
                            "last to the first", changes="arithmetic")
    qkv_conv_kernel: int = flag(None, "width of a depthwise convolution of queries, keys and values inside each "
                                "protein", kind=int, check=_ODD, changes="arithmetic")
    final_logit_softcapping: float = flag(None, "keep logits between minus and plus this by a tanh", kind=float,
                                          check=positive, changes="arithmetic")
    contact_head: bool = flag(False, "include ESM's contact regression, which is not trained", changes="arithmetic")
    fp32_residual_connection: bool = flag(False, "keep the residual stream in fp32 under --fp16 or --bf16",
                                          changes="course")
    checkpoint_activations: bool = flag(False, "recompute each block's activations in the backward pass",
                                        aliases=("--recompute-activations",), changes="nothing", common=True)
    checkpoint_num_layers: int = flag(1, "blocks between two checkpointed activations", kind=int, check=positive,
                                      changes="nothing")
    distribute_checkpointed_activations: bool = flag(False, "shard checkpointed activations over the tensor-parallel "
                                                     "ranks", changes="nothing")
    recompute_granularity: str = flag(None, "selective: recompute only the core of attention; full: "
                                      "--checkpoint-activations", choices=("selective", "full"), changes="nothing")
    attention_backend: str = flag("auto", "implementation of attention: the fastest that supports the run, or a given "
                                  "one if it does: PyTorch's varlen_attn, Triton kernels or PyTorch's FlexAttention on "
                                  "GPUs, compiled C++ code on CPUs, or PyTorch one protein at a time",
                                  choices=("auto", "varlen", "triton", "flex", "compiled", "plain"), changes="nothing")

    @property
    def num_groups(self) -> int:
        """The number of groups of heads; the heads of a group share a key and a value."""
        return self.num_query_groups or self.num_attention_heads

    def window(self, block: int) -> tuple[int, int] | None:
        """The attention window of a block: how many tokens to the left and right a token sees; None: its whole protein.
        """
        if self.window_size is None or (self.window_attn_skip_freq and (block + 1) % self.window_attn_skip_freq == 0):
            return None
        left, right = self.window_size
        return left, right
