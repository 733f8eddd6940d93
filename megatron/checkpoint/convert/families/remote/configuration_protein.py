"""The configuration of the protein language model in this folder; its fields are named after the training flags."""

from transformers import PretrainedConfig


class ProteinConfig(PretrainedConfig):
    """The shape and the arithmetic of a `ProteinForMaskedLM`."""

    model_type = "protein_lm"
    attribute_map = {"num_hidden_layers": "num_layers", "intermediate_size": "ffn_hidden_size",
                     "initializer_range": "init_method_std"}

    def __init__(self, vocab_size=128, num_layers=12, hidden_size=768, ffn_hidden_size=3072, num_attention_heads=12,
                 num_query_groups=None, kv_channels=64, max_position_embeddings=1024, pad_token_id=0, mask_token_id=1,
                 position_embedding_type="learned_absolute", rotary_base=10000.0, rotary_percent=1.0,
                 rotary_frequency_precision="fp32", window_size=None, window_attn_skip_freq=None,
                 normalization="LayerNorm", norm_placement="pre", layernorm_epsilon=1e-5, embedding_layernorm=False,
                 qk_layernorm=False, apply_residual_connection_post_layernorm=False, disable_bias_linear=False,
                 untie_embeddings_and_output_weights=False, token_dropout=False, swiglu=False, squared_relu=False,
                 bias_gelu_fusion=True, openai_gelu=False, value_embeddings=False, x0_skips=False, unet_skips=False,
                 qkv_conv_kernel=None, final_logit_softcapping=None, contact_head=False, attention_dropout=0.1,
                 hidden_dropout=0.1, init_method_std=0.02, **others):
        mine = {name: value for name, value in locals().items() if name not in ("self", "others", "__class__")}
        super().__init__(**{"pad_token_id": pad_token_id, "tie_word_embeddings": False, **others})
        for name, value in mine.items():
            setattr(self, name, value)
