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

PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "attention_dropout": 0.0, "hidden_dropout": 0.0,
        "seq_length": 1024, "micro_batch_size": 2, "global_batch_size": 4, "train_iters": 350, "lr": 1e-3,
        "min_lr": 1e-4, "lr_decay_style": "cosine", "lr_warmup_fraction": 0.1, "adam_beta2": 0.98, "log_interval": 10,
        "save_interval": 100, "eval_interval": 100, "eval_iters": 0,
    },
    "tape": {**_PUBLISHED, "num_layers": 12, "hidden_size": 768, "num_attention_heads": 12},
    "proteinlm-200m": {**_PUBLISHED, "num_layers": 16, "hidden_size": 1024, "num_attention_heads": 16},
    "proteinlm-3b": {**_PUBLISHED, "num_layers": 36, "hidden_size": 2560, "num_attention_heads": 40,
                     "checkpoint_activations": True},
}
