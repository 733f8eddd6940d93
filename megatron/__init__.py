"""Pretraining of protein language models, Megatron-style; `load_pretrained` gives one that was trained, to be asked."""

import sys
from traceback import walk_tb
from types import TracebackType
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


def _tell_what_is_missing(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """One line and exit status 2, as for any mistake of the user's, where the package needs one that is not there."""
    missing = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    importers = (str(frame.f_globals.get("__name__")).split(".")[0] for frame, _ in walk_tb(trace))
    if not missing or missing == __name__ or __name__ not in importers:
        return _excepthook(kind, error, trace)
    print(f"error: {missing} is not installed in {sys.executable}; activate the environment that has it, as in `source "
          ".venv/bin/activate`, which `bash examples/setup.sh run` makes", file=sys.stderr)
    sys.exit(2)


# Here, since each door imports this first, and all imports that fail come later.
_excepthook, sys.excepthook = sys.excepthook, _tell_what_is_missing
