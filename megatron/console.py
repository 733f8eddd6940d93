"""The programs as commands of an installation: `proteinlm-embed` is tools/embed.py, there megatron.tools.embed.

`proteinlm-pretrain` is pretrain_tape.py, `proteinlm-preprocess` tools/preprocess_data.py; the others are called as
their files. setup.py lists them. An editable installation has no megatron.tools: there they are the checkout's files.
"""

import runpy
import sys
from pathlib import Path

_OTHERWISE = {"preprocess": "preprocess_data"}


def run() -> None:
    """Run the program that this process was called as."""
    name, here = Path(sys.argv[0]).stem.removeprefix("proteinlm-"), Path(__file__).resolve().parent
    program = _OTHERWISE.get(name, name.replace("-", "_"))
    if name == "pretrain":
        runpy.run_module("pretrain_tape", run_name="__main__", alter_sys=True)
    elif (here / "tools").is_dir():
        runpy.run_module(f"megatron.tools.{program}", run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(here.parent / "tools" / f"{program}.py"), run_name="__main__")
