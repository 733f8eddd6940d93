"""Runs the program behind an installed command, such as `proteinlm-embed` (setup.py lists the commands).

`proteinlm-pretrain` runs pretrain_tape.py, `proteinlm-preprocess` tools/preprocess_data.py, and every other
`proteinlm-NAME` the file tools/NAME.py, with underscores for hyphens. An installation from a wheel has the files of
tools/ as modules megatron.tools.NAME; an editable installation runs those of the checkout.
"""

import runpy
import sys
from pathlib import Path

_OTHERWISE = {"preprocess": "preprocess_data"}


def run() -> None:
    """Run the program that the name of the command, sys.argv[0], stands for."""
    name, here = Path(sys.argv[0]).stem.removeprefix("proteinlm-"), Path(__file__).resolve().parent
    program = _OTHERWISE.get(name, name.replace("-", "_"))
    if name == "pretrain":
        runpy.run_module("pretrain_tape", run_name="__main__", alter_sys=True)
    elif (here / "tools").is_dir():
        runpy.run_module(f"megatron.tools.{program}", run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(here.parent / "tools" / f"{program}.py"), run_name="__main__")
