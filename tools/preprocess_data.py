"""Turns files of proteins into an indexed dataset: `python tools/preprocess_data.py --input A [B …] --output-prefix P`.

`--help` lists the flags; `protein_tools/README.md` shows what can be read.
"""

import sys
from pathlib import Path

if not __package__:  # else it is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.data.preprocess.flags import parse_arguments  # noqa: E402
from megatron.data.preprocess.run import preprocess  # noqa: E402
from megatron.log import exit_status  # noqa: E402


def main() -> int:
    """The exit status: 0, 2 for a mistake of the user's, 130 after Ctrl-C."""
    def work() -> None:
        preprocess(parse_arguments(sys.argv[1:]))

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
