"""Small configurations of each family of models; tests of layouts run all of them.

Each family has options that the others lack.
"""

from dataclasses import replace

from megatron.config import ModelConfig

PROTEINLM = ModelConfig(num_layers=4, hidden_size=32, num_attention_heads=4, ffn_hidden_size=64, kv_channels=8,
                        num_query_groups=4, max_position_embeddings=64, attention_dropout=0.0, hidden_dropout=0.0,
                        make_vocab_size_divisible_by=8)
ESM2 = replace(PROTEINLM, position_embedding_type="rope", token_dropout=True, bias_gelu_fusion=False,
               contact_head=True)
PROTBERT = replace(PROTEINLM, norm_placement="post", embedding_layernorm=True, bias_gelu_fusion=False)
RECIPE = replace(PROTEINLM, position_embedding_type="rope", rotary_percent=0.5, normalization="RMSNorm",
                 norm_placement="both", qk_layernorm=True, swiglu=True, disable_bias_linear=True, num_attention_heads=8,
                 num_query_groups=4, untie_embeddings_and_output_weights=True, window_size=(5, 3),
                 window_attn_skip_freq=2, value_embeddings=True, x0_skips=True, unet_skips=True, qkv_conv_kernel=3,
                 final_logit_softcapping=15.0, zero_init_output=True)
FAMILIES = {"proteinlm": PROTEINLM, "esm2": ESM2, "protbert": PROTBERT, "recipe": RECIPE}
MASK_ID = 6
