"""Named sets of flags: the published models with their hyperparameters, and a small one for a computer without a GPU.

A preset is a default: any flag that is given beside it wins.
"""

from typing import Any

# Published with ProteinLM (arXiv 2108.07435) and TAPE's transformer_config.json. The originals ran in fp16; bf16 needs
# no loss scale, and --fp16 brings the original's choice back.
_PUBLISHED: dict[str, Any] = {
    "attention_dropout": 0.1, "hidden_dropout": 0.1, "layernorm_epsilon": 1e-12, "seq_length": 2176,
    "max_position_embeddings": 2176, "micro_batch_size": 4, "train_iters": 1_000_000, "lr": 1e-4, "min_lr": 1e-5,
    "lr_decay_style": "linear", "lr_decay_iters": 990_000, "lr_warmup_fraction": 0.01, "weight_decay": 0.01,
    "clip_grad": 1.0, "log_interval": 100, "save_interval": 10_000, "eval_interval": 1000, "eval_iters": 10,
    "bf16": True,
}

# ESM-2 (Lin et al., 2023, doi 10.1126/science.ade2574, supplement): 2 M tokens a batch (3.2 M for 15B), AdamW with
# betas 0.9 and 0.98, from 4e-4 linearly to a tenth of it over 90 % of 500 k steps, after a warm-up of 2,000; no
# dropout. There a row was one protein, cropped to 1,024 tokens; here it is 1,024 tokens of whole proteins, of which
# 2,048 are as many.
_ESM2: dict[str, Any] = {
    "position_embedding_type": "rope", "token_dropout": True, "bias_gelu_fusion": False, "contact_head": True,
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "layernorm_epsilon": 1e-5, "vocab_file": "esm",
    "protein_ends": "both", "seq_length": 1024, "global_batch_size": 2048, "train_iters": 500_000, "lr": 4e-4,
    "min_lr": 4e-5, "lr_decay_style": "linear", "lr_decay_iters": 450_000, "lr_warmup_iters": 2000,
    "weight_decay": 0.01, "adam_beta2": 0.98, "clip_grad": 1.0, "log_interval": 100, "save_interval": 5000,
    "eval_interval": 1000, "eval_iters": 10, "bf16": True,
}
# ESM-1b's shape (Rives et al., 2021, doi 10.1073/pnas.2016239118), with the course of ESM-2.
_ESM1B: dict[str, Any] = {
    **_ESM2, "position_embedding_type": "learned_absolute", "max_position_embeddings": 1024,
    "embedding_layernorm": True, "micro_batch_size": 8,
}
# ProtBERT's shape (Elnaggar et al., 2021, arXiv 2007.06225), with the course of ProteinLM: LAMB on batches of thousands
# of rows is not here.
_PROTBERT: dict[str, Any] = {
    **_PUBLISHED, "norm_placement": "post", "embedding_layernorm": True, "bias_gelu_fusion": False,
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "vocab_file": "protbert", "protein_ends": "both",
    "max_position_embeddings": 40_000, "seq_length": 2048,
}

# The recipe that comes furthest at small sizes (benchmarks/RESULTS.md, "Recipes").
_RECIPE: dict[str, Any] = {
    "optimizer": "muon", "lr": 1e-3, "lr_decay_style": "cosine", "adam_beta2": 0.98, "position_embedding_type": "rope",
    "normalization": "RMSNorm", "qk_layernorm": True, "squared_relu": True, "zero_init_output": True,
    "untie_embeddings_and_output_weights": True, "qkv_conv_kernel": 5,
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "seq_length": 1024,
}
# Settings scaled up from there: 12 residues a parameter in batches of 524,288 tokens, heads of 64. Not measured.
_RECIPE_AT_SCALE: dict[str, Any] = {
    **_RECIPE, "global_batch_size": 512, "lr_warmup_iters": 100, "log_interval": 10, "save_interval": 500,
    "eval_interval": 500, "eval_iters": 10, "bf16": True,
}

PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        **_RECIPE, "num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "micro_batch_size": 2,
        "global_batch_size": 4, "train_iters": 1000, "lr_warmup_fraction": 0.1, "log_interval": 10,
        "save_interval": 100, "eval_interval": 500, "eval_iters": 0, "precision": "auto",
    },
    "recipe-8m": {**_RECIPE_AT_SCALE, "num_layers": 6, "hidden_size": 320, "num_attention_heads": 5,
                  "micro_batch_size": 32, "train_iters": 200},
    "recipe-35m": {**_RECIPE_AT_SCALE, "num_layers": 12, "hidden_size": 512, "num_attention_heads": 8,
                   "micro_batch_size": 32, "train_iters": 900},
    "recipe-150m": {**_RECIPE_AT_SCALE, "num_layers": 30, "hidden_size": 640, "num_attention_heads": 10,
                    "micro_batch_size": 16, "train_iters": 3500},
    "recipe-650m": {**_RECIPE_AT_SCALE, "num_layers": 33, "hidden_size": 1280, "num_attention_heads": 20,
                    "micro_batch_size": 8, "train_iters": 15_000},
    "tape": {**_PUBLISHED, "num_layers": 12, "hidden_size": 768, "num_attention_heads": 12},
    "proteinlm-200m": {**_PUBLISHED, "num_layers": 16, "hidden_size": 1024, "num_attention_heads": 16},
    "proteinlm-3b": {**_PUBLISHED, "num_layers": 36, "hidden_size": 2560, "num_attention_heads": 40,
                     "checkpoint_activations": True},
    "esm2-8m": {**_ESM2, "num_layers": 6, "hidden_size": 320, "num_attention_heads": 20, "micro_batch_size": 32},
    "esm2-35m": {**_ESM2, "num_layers": 12, "hidden_size": 480, "num_attention_heads": 20, "micro_batch_size": 32},
    "esm2-150m": {**_ESM2, "num_layers": 30, "hidden_size": 640, "num_attention_heads": 20, "micro_batch_size": 16},
    "esm2-650m": {**_ESM2, "num_layers": 33, "hidden_size": 1280, "num_attention_heads": 20, "micro_batch_size": 8},
    "esm2-3b": {**_ESM2, "num_layers": 36, "hidden_size": 2560, "num_attention_heads": 40, "micro_batch_size": 2,
                "checkpoint_activations": True},
    "esm2-15b": {**_ESM2, "num_layers": 48, "hidden_size": 5120, "num_attention_heads": 40, "micro_batch_size": 1,
                 "global_batch_size": 3200, "lr": 1.6e-4, "min_lr": 1.6e-5, "train_iters": 270_000,
                 "lr_decay_iters": 243_000, "weight_decay": 0.1, "checkpoint_activations": True},
    "esm1b": {**_ESM1B, "num_layers": 33, "hidden_size": 1280, "num_attention_heads": 20},
    "protbert": {**_PROTBERT, "num_layers": 30, "hidden_size": 1024, "num_attention_heads": 16},
}
