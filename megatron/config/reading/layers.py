"""Merges the values of a preset, a file and the command line, where some flags override others of another name."""

from collections.abc import Mapping
from typing import Any

# Flags that express the same in different ways: a flag (key) removes those of lower priority that contradict it.
_REPLACES = {
    "fp16": ("bf16", "precision"), "bf16": ("fp16", "precision"), "precision": ("fp16", "bf16"),
    "recompute_granularity": ("checkpoint_activations",), "checkpoint_activations": ("recompute_granularity",),
    "train_samples": ("train_iters", "lr_decay_iters", "lr_wsd_decay_iters", "lr_warmup_iters"),
    "train_iters": ("train_samples", "lr_decay_samples", "lr_wsd_decay_samples", "lr_warmup_samples",
                    "rampup_batch_size"),
    "lr_decay_samples": ("lr_decay_iters",), "lr_decay_iters": ("lr_decay_samples",),
    "lr_warmup_fraction": ("lr_warmup_iters", "lr_warmup_samples"),
    "lr_warmup_iters": ("lr_warmup_fraction", "lr_warmup_samples"),
    "lr_warmup_samples": ("lr_warmup_fraction", "lr_warmup_iters"),
    "start_weight_decay": ("weight_decay",), "end_weight_decay": ("weight_decay",),
    "weight_decay": ("start_weight_decay", "end_weight_decay", "weight_decay_incr_style"),
}

# The same for a switch that is given as off.
_REPLACES_OFF = {"fp16": ("precision",), "bf16": ("precision",), "checkpoint_activations": ("recompute_granularity",)}


def overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `above` and, for other flags that they do not contradict, of `below`, by field name."""
    replaced = {other for name, value in above.items()
                for other in (_REPLACES_OFF if value is False else _REPLACES).get(name, ())}
    return {**{name: value for name, value in below.items() if name not in replaced}, **above}
