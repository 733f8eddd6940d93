"""Writes a checkpoint in another format or layout: `python tools/convert_checkpoint.py --load-dir A --save-dir B …`.

`--help` lists the flags. No more than a tensor is held in memory, and no pickle runs.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # else it is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.checkpoint.convert.conversion import convert  # noqa: E402
from megatron.checkpoint.convert.formats import AUTO, FORMATS  # noqa: E402
from megatron.config.command_line import OneLineParser  # noqa: E402
from megatron.log import Log, exit_status  # noqa: E402


def parser() -> argparse.ArgumentParser:
    """The flags, spelled as in Megatron-LM's tool."""
    flags = OneLineParser(description="Write a checkpoint in another format or layout.", allow_abbrev=False)
    flags.add_argument("--load-dir", type=Path, required=True, help="folder of a run or of a checkpoint, or a file")
    flags.add_argument("--save-dir", type=Path, required=True, help="new folder for the result")
    flags.add_argument("--from", "--loader", dest="loader", choices=(AUTO, *FORMATS), default=AUTO,
                       help="input format (default: detected)")
    flags.add_argument("--to", "--saver", dest="saver", choices=tuple(FORMATS), required=True,
                       help="output format")
    flags.add_argument("--target-tensor-parallel-size", type=int, default=1, help="for Megatron's files (default: 1)")
    flags.add_argument("--target-pipeline-parallel-size", type=int, default=1, help="for Megatron's files (default: 1)")
    flags.add_argument("--iteration", type=int, help="which of a run's checkpoints (default: the newest)")
    flags.add_argument("--true-vocab-size", type=int,
                       help="tokens of the vocabulary; rows beyond its padding are cut off")
    flags.add_argument("--load-ema", action="store_true", help="write the average of --ema as the weights")
    return flags


def main() -> int:
    """The exit status: 0, 2 for a mistake of the user's, 130 after Ctrl-C."""
    def work() -> None:
        given = parser().parse_args()
        convert(given.load_dir, given.save_dir, given.loader, given.saver, tensor=given.target_tensor_parallel_size,
                pipeline=given.target_pipeline_parallel_size, iteration=given.iteration,
                vocab_size=given.true_vocab_size, log=Log(), takes_average=given.load_ema)

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
