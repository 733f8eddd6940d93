"""Says what a checkpoint of any format is, and whether it is whole: `python tools/inspect_checkpoint.py PATH`.

Exit 0 where it is and all its numbers are finite, 1 where not. No pickle runs.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # else it is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.checkpoint.convert.formats import AUTO, FORMATS  # noqa: E402
from megatron.checkpoint.convert.inspection import inspect  # noqa: E402
from megatron.config.command_line import OneLineParser  # noqa: E402
from megatron.errors import CheckpointError  # noqa: E402
from megatron.log import Log, exit_status  # noqa: E402


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = OneLineParser(description="Say what a checkpoint is, and whether it is complete.", allow_abbrev=False)
    flags.add_argument("path", type=Path, help="folder of a run or of a checkpoint, or a file")
    flags.add_argument("--loader", choices=(AUTO, *FORMATS), default=AUTO, help="its format (default: detected)")
    flags.add_argument("--iteration", type=int, help="which of a run's checkpoints (default: the newest)")
    return flags


def main() -> int:
    """The exit status: 0, 1 for a checkpoint that is not whole, 2 for a mistake of the user's, 130 after Ctrl-C."""
    def work() -> int:
        given = parser().parse_args()
        try:
            return 0 if inspect(given.path, given.loader, given.iteration, Log()) else 1
        except CheckpointError as error:
            print(f"not whole: {error}")
            return 1

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
