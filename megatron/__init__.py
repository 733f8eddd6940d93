"""Pretraining of protein language models, Megatron-style; `load_pretrained` gives one that was trained, to be asked."""

import sys
from pathlib import Path
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


def _is_our_program() -> bool:
    """Whether this process runs one of the project's programs, and not another that imports the package."""
    program, root = Path(sys.argv[0] if sys.argv else ""), Path(__file__).resolve().parents[1]
    is_here = program.resolve().parent in (root, root / "tools", root / "protein_tools")
    return (program.suffix == ".py" and is_here) or program.name == "-m" or program.name.startswith("proteinlm-")


def _tell_in_a_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """One line where imports of this package fail: status 2 where it needs another that is not there, 130 on Ctrl-C."""
    frames = [frame for frame, _ in walk_tb(trace)]
    is_ours = __name__ in (str(frame.f_globals.get("__name__")).split(".")[0] for frame in frames)
    is_at_start = any(frame.f_code.co_name == "<module>" or "importlib" in frame.f_code.co_filename
                      for frame in frames[1:2])  # as the program imports, not from one of its functions
    missing = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if is_ours and is_at_start and isinstance(error, KeyboardInterrupt):
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    if not is_ours or missing in ("", __name__):
        return sys.__excepthook__(kind, error, trace)
    print(f"error: {missing} is not installed in {sys.executable}; activate the environment that has it, as in `source "
          ".venv/bin/activate`, which `bash examples/setup.sh run` makes", file=sys.stderr)
    sys.exit(2)


if _is_our_program():  # here, since each of them imports this first, and what may fail later
    sys.excepthook = _tell_in_a_line
