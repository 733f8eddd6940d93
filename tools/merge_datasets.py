"""Merges indexed datasets: `python tools/merge_datasets.py --input FOLDER --output-prefix P`, like Megatron-LM's tool.

All pairs of .bin and .idx in the folder become P.bin and P.idx, in the natural order of their names (x_2 before x_10).
The result is that of tools/preprocess_data.py on all their inputs at once, in that order. --input also takes a list of
prefixes, or their .bin files, and keeps its order. Names and statistics are merged too. Nothing is written if datasets
do not fit together, a .bin or .idx is missing or cut short, or there is no space.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # else it is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.config.command_line import OneLineParser  # noqa: E402
from megatron.data.preprocess.merging import merge  # noqa: E402
from megatron.log import exit_status  # noqa: E402


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flags.add_argument("--input", nargs="+", required=True, metavar="FOLDER", help="a folder of pairs, or prefixes")
    flags.add_argument("--output-prefix", required=True, metavar="P", help="path of the output without .bin and .idx")
    flags.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return flags


def main() -> int:
    """The exit status: 0, 2 for a mistake of the user's, 130 after Ctrl-C."""
    def work() -> None:
        given = parser().parse_args()
        merge(given.input, given.output_prefix, given.overwrite)

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
