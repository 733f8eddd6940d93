"""Examines this machine: `python tools/doctor.py`, or under torchrun all hosts of a job and the links between them.

Checks what is installed (and what each missing package is for), the C++ helpers, GPUs, limits and environment.
Measures disk, memory and matrix products, and names the preset that fits. Each finding is ok, a note (it costs speed,
or only some users need it) or wrong, with the command that fixes it. Takes less than 30 seconds. The exit status is 0
if nothing is wrong, 1 if something necessary is, 2 for a mistake in the flags. Needs no package.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # else it is installed
    sys.path.insert(0, str(ROOT))

if sys.version_info < (3, 10):  # noqa: UP036 (who has an older one shall hear of it)
    sys.exit(f"wrong: Python {sys.version.split()[0]}, and 3.10 or newer is needed: PYTHON=/path/to/python3 bash "
             "examples/setup.sh run")

from megatron.config.command_line import OneLineParser  # noqa: E402
from megatron.doctor.run import examine  # noqa: E402
from megatron.log import exit_status  # noqa: E402


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flags.add_argument("--save", type=Path, default=Path(), metavar="FOLDER",
                       help="folder where runs will save; its disk is measured (default: here)")
    flags.add_argument("--data-path", nargs="+", default=(), metavar="PREFIX",
                       help="as for pretrain_tape.py; all files are opened, and compared between hosts")
    flags.add_argument("--json", type=Path, metavar="FILE", help="also write the findings to this file")
    return flags


def main() -> int:
    """The exit status: 0, 1 where something is wrong, 2 for a mistake of the user's, 130 after Ctrl-C."""
    def work() -> int:
        given = parser().parse_args()
        return examine(given.save, tuple(given.data_path), given.json)

    return exit_status(work)


def leave(status: int) -> None:
    """Ends the process; a rank among others as the launcher's ranks do."""
    if "torch.distributed" in sys.modules:
        from megatron.parallel.launch.leaving import leave as leave_the_others
        leave_the_others(status)
    sys.exit(status)


if __name__ == "__main__":
    leave(main())
