"""Merges a Megatron checkpoint's files of ranks into one, or splits them otherwise: as the original's tool, on CPUs.

python tools/merge_mp_partitions.py --model-type BERT --load A [--save B] [--target-tensor-model-parallel-size N]
[--target-pipeline-model-parallel-size N] [--vocab-file V]; flags of the model are compared with the checkpoint's.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

if not __package__:  # else it is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.checkpoint.convert import megatron_v2  # noqa: E402
from megatron.checkpoint.convert.conversion import FlagNames, convert  # noqa: E402
from megatron.config import Config, ModelConfig, ParallelConfig  # noqa: E402
from megatron.config.command_line import OneLineParser, add_section_flags  # noqa: E402
from megatron.config.declaration import flag_name  # noqa: E402
from megatron.config.reading.checks import check_heads  # noqa: E402
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
    check_heads(state["config"], load)
    compared = [item for item in fields(ModelConfig) if item.metadata["changes"] == "arithmetic"]
    compared += [item for item in fields(ParallelConfig) if item.name in state["layout"]]
    # What a checkpoint does not say, the original computes as by our defaults; but for what has none.
    config = Config().as_dict() | dict.fromkeys(("num_attention_heads", "kv_channels")) | state["config"]
    config |= {"num_query_groups": config["num_attention_heads"]} | state["layout"]
    for item in compared:
        if given.get(item.name, config[item.name]) != config[item.name]:
            raise ConfigError(f"{flag_name(item)} is {given[item.name]}, but the checkpoint in {load} has "
                              f"{config[item.name]}; give that value, or leave the flag out")
    convert(load, given["save"] or load / "merged", _FORMAT, _FORMAT, iteration=None, log=log,
            tensor=given["target_tensor_model_parallel_size"], pipeline=given["target_pipeline_model_parallel_size"],
            vocab_size=Vocab.from_file(vocab_file, given.get("mask_token")).size if vocab_file else None,
            names=FlagNames("--save", "the size of --vocab-file"))


def main() -> int:
    """The exit status: 0, 2 for a mistake of the user's, 130 after Ctrl-C."""
    return exit_status(lambda: merge(vars(parser().parse_args()), Log()))


if __name__ == "__main__":
    sys.exit(main())
