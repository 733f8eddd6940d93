"""Fine-tunes a model on a task, and predicts with it:

    python tools/finetune.py TASK --load CHECKPOINT --data FOLDER --save MODEL
    python tools/finetune.py predict MODEL FILE OUTPUT

CHECKPOINT is anything that --load of pretrain_tape.py takes. TASK is one of TAPE's, or `own`, for example with
--train-data FILE. `TASK --help` lists the flags of training, `predict --help` those of prediction. FILE is FASTA, or
any format of a task's files; OUTPUT ends in .csv or .jsonl.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

if not __package__:  # else it is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.checkpoint.newest import saved_flags  # noqa: E402
from megatron.config import ParallelConfig  # noqa: E402
from megatron.config.command_line import OneLineParser  # noqa: E402
from megatron.files import leaving_no_empty  # noqa: E402
from megatron.finetune.flags import Flags, parse_flags  # noqa: E402
from megatron.finetune.predictions.files import predict  # noqa: E402
from megatron.finetune.run import HEADS, run  # noqa: E402
from megatron.infer.door import add_layout_flags, add_skipping_flag, parallel_of  # noqa: E402
from megatron.infer.pretrained import PRECISIONS  # noqa: E402
from megatron.log import Log  # noqa: E402
from megatron.parallel.launch.environment import Launch  # noqa: E402
from megatron.parallel.launch.leaving import leave  # noqa: E402
from megatron.parallel.layout import check_layout  # noqa: E402
from megatron.parallel.mesh import Mesh, grid_sizes  # noqa: E402
from megatron.parallel.program import status_of  # noqa: E402
from megatron.study.table import table  # noqa: E402
from megatron.train.state import BatchSizes  # noqa: E402

PREDICT = "predict"


def main() -> int:
    """The exit status: 0, 2 for a mistake of the user's, 1 where a rank failed, 130 after Ctrl-C."""
    return status_of(partial(prepare, sys.argv[1:]))


def prepare(argv: list[str], launch: Launch) -> tuple[ParallelConfig, Callable[[Mesh, Log], None]]:
    """The layout that is asked for and what is to be done in it; raises ConfigError."""
    if argv[:1] == [PREDICT]:
        given = predict_parser().parse_args(argv[1:])
        return parallel_of(given, launch), partial(foretell, given)
    flags = parse_flags(argv, __doc__ or "")
    saved = saved_flags(flags.others["load"])
    config = flags.config(saved, 1)
    check_layout(config, launch.size)
    data_size = grid_sizes(config.parallel, launch.size)["data"]
    BatchSizes(flags.config(saved, data_size).training, data_size)  # raises where they do not divide
    return config.parallel, partial(teach, flags)


def teach(flags: Flags, mesh: Mesh, log: Log) -> None:
    """Fine-tune, and print how well the task is done."""
    rows = run(flags, mesh, log)
    if rows is not None:
        log.line(f"\n{table(HEADS, rows, num_left=2)}\n\n  model and report: {flags.others['save']}")


def foretell(given: argparse.Namespace, mesh: Mesh, log: Log) -> None:
    """Write what a taught model predicts."""
    with leaving_no_empty(Path(given.output)):
        predict(given.model, given.file, given.output, given.precision, given.skip_bad_records, mesh, log,
                sequence_key=given.sequence_key, name_key=given.name_key, overwrite=given.overwrite)


def predict_parser() -> argparse.ArgumentParser:
    """The flags of predicting."""
    flags = OneLineParser(prog=f"finetune.py {PREDICT}", description="Predict with a fine-tuned model.",
                          allow_abbrev=False)
    flags.add_argument("model", metavar="MODEL", help="folder of --save")
    flags.add_argument("file", metavar="FILE", help="proteins: FASTA, or any format of a task's files")
    flags.add_argument("output", metavar="OUTPUT", help="file ending in .csv or .jsonl")
    flags.add_argument("--sequence-key", "--json-key", "--json-keys", metavar="KEY",
                       help="key or column of the sequence (default: the task's, else that of FILE's kind)")
    flags.add_argument("--name-key", metavar="KEY",
                       help="key or column of the name (default: id; proteins without a name are numbered)")
    flags.add_argument("--overwrite", action="store_true", help="replace an existing output")
    flags.add_argument("--precision", choices=PRECISIONS, default="fp32",
                       help="precision of the computation (default: fp32)")
    add_skipping_flag(flags)
    add_layout_flags(flags)
    return flags


if __name__ == "__main__":
    leave(main())
