"""Merges a Megatron checkpoint's files of ranks into one, or splits them otherwise: as the original's tool, on CPUs.

python tools/merge_mp_partitions.py --model-type BERT --load A [--save B] [--target-tensor-model-parallel-size N]
[--target-pipeline-model-parallel-size N] [--vocab-file V]; flags of the model are compared with the checkpoint's.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

if not __package__:  # else it is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.checkpoint.convert import megatron_v2  # noqa: E402
from megatron.checkpoint.convert.conversion import FlagNames, convert  # noqa: E402
from megatron.config import Config  # noqa: E402
from megatron.config.command_line import OneLineParser, add_section_flags  # noqa: E402
from megatron.config.reading.megatron_flags import ALWAYS_SO  # noqa: E402
from megatron.data.corpus.vocab import Vocab  # noqa: E402
from megatron.errors import ConfigError  # noqa: E402
from megatron.log import Log, exit_status  # noqa: E402

_FORMAT = "megatron-v2"


def parser() -> argparse.ArgumentParser:
    """The flags, spelled as the original's."""
    flags = OneLineParser(description=__doc__, allow_abbrev=False)
    flags.add_argument("--model-type", choices=("BERT",), required=True, help="what the checkpoint is of")
    flags.add_argument("--load", type=Path, required=True, help="folder of a run of Megatron")
    flags.add_argument("--save", type=Path, help="new folder of a run (default: merged/ in that of --load)")
    flags.add_argument("--target-tensor-model-parallel-size", type=int, default=1, help="files to split into")
    flags.add_argument("--target-pipeline-model-parallel-size", type=int, default=1, help="files to split into")
    for name, section in Config().sections():  # which the original's commands give, though the files know
        if name != "checkpoint":
            add_section_flags(flags, type(section))
    for name, reason in ALWAYS_SO.items():
        flags.add_argument(name, action="store_true", help=f"always so: {reason}")
    return flags


def merge(given: dict[str, Any], log: Log) -> None:
    """Do it; raises ConfigError where flags are not the checkpoint's, CheckpointError for what it is."""
    load, vocab_file = given["load"], given.get("vocab_file")
    state = megatron_v2.read(load).state
    config = state["config"] | state["layout"]
    for name in ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", *state["layout"]):
        if given.get(name, config.get(name)) != config.get(name):
            raise ConfigError(f"--{name.replace('_', '-')} is {given[name]}, but the checkpoint in {load} has "
                              f"{config.get(name)}; give that value, or leave the flag out")
    convert(load, given["save"] or load / "merged", _FORMAT, _FORMAT, iteration=None, log=log,
            tensor=given["target_tensor_model_parallel_size"], pipeline=given["target_pipeline_model_parallel_size"],
            vocab_size=Vocab.from_file(vocab_file, given.get("mask_token")).size if vocab_file else None,
            names=FlagNames("--save", "the size of --vocab-file"))


def main() -> int:
    """The exit status: 0, 2 for a mistake of the user's, 130 after Ctrl-C."""
    return exit_status(lambda: merge(vars(parser().parse_args()), Log()))


if __name__ == "__main__":
    sys.exit(main())
