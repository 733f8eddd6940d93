"""The programs as commands of an installation: `proteinlm-embed` is tools/embed.py, there megatron.tools.embed.

`proteinlm-pretrain` is pretrain_tape.py, `proteinlm-preprocess` tools/preprocess_data.py; the others are called as
their files. setup.py lists them.
"""

import runpy
import sys
from pathlib import Path

_OTHERWISE = {"pretrain": "pretrain_tape", "preprocess": "megatron.tools.preprocess_data"}


def run() -> None:
    """Run the program that this process was called as."""
    name = Path(sys.argv[0]).stem.removeprefix("proteinlm-")
    runpy.run_module(_OTHERWISE.get(name, f"megatron.tools.{name.replace('-', '_')}"), run_name="__main__",
                     alter_sys=True)
