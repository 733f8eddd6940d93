"""Pretraining of protein language models, Megatron-style; `load_pretrained` gives one that was trained, to be asked."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.infer.pretrained import load_pretrained

__all__ = ["load_pretrained"]


def __getattr__(name: str) -> Any:
    """Imported when it is asked for: most of the package does without PyTorch, and PyTorch takes seconds."""
    if name != "load_pretrained":
        raise AttributeError(f"module 'megatron' has no attribute {name!r}")
    from megatron.infer.pretrained import load_pretrained

    return load_pretrained
