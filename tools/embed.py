"""Embeds proteins: `python tools/embed.py CHECKPOINT INPUT [INPUT ...] OUTPUT [--layers …] [--include …]`.

CHECKPOINT is anything that --load of pretrain_tape.py takes; INPUT anything that tools/preprocess_data.py takes, such
as FASTA. The ending of OUTPUT sets the format: HDF5 (.h5), NumPy's archive (.npz) or Parquet (.parquet); without an
ending it is a folder with one .pt file for each protein, as fair-esm's extract.py writes it. Proteins keep the order of
the input, under the first word of their headers. Run again after a kill, it resumes. Under torchrun the ranks share the
proteins.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

if not __package__:  # else it is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.config.command_line import OneLineParser  # noqa: E402
from megatron.errors import ConfigError  # noqa: E402
from megatron.infer.answers import INCLUDED, Asked  # noqa: E402
from megatron.infer.door import add_model_flags, add_protein_flags, asked, proteins_of  # noqa: E402
from megatron.infer.embed.run import Work, embed  # noqa: E402
from megatron.infer.embed.writers import check_form  # noqa: E402
from megatron.infer.pretrained import load  # noqa: E402
from megatron.log import Log  # noqa: E402
from megatron.parallel.launch.leaving import leave  # noqa: E402
from megatron.parallel.mesh import Mesh  # noqa: E402


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flags.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's folder, or a checkpoint of another program")
    flags.add_argument("input", nargs="+", metavar="INPUT", help="files of proteins")
    flags.add_argument("output", type=Path, metavar="OUTPUT", help="a file of .h5, .npz or .parquet, or a folder")
    flags.add_argument("--include", nargs="+", choices=INCLUDED, default=["mean"], metavar="WHAT",
                       help=f"what to write: {', '.join(INCLUDED)} (default: mean)")
    flags.add_argument("--layers", nargs="+", type=int, default=[-1], metavar="N",
                       help="layers to write: 0 is the embeddings, N the output of block N, -1 the last (default)")
    flags.add_argument("--half", action="store_true", help="write numbers in fp16 instead of fp32")
    flags.add_argument("--window", type=int, metavar="N",
                       help="read proteins of more than N residues in overlapping windows (default: whole)")
    add_protein_flags(flags)
    add_model_flags(flags)
    return flags


def main() -> int:
    """The exit status: 0, 2 for a mistake of the user's, 1 where a rank failed, 130 after Ctrl-C."""
    return asked(parser(), embed_files)


def embed_files(given: argparse.Namespace, mesh: Mesh, log: Log) -> None:
    """Embed; raises a UserError for what cannot be."""
    if given.window is not None and given.window < 2:
        raise ConfigError(f"--window is {given.window}; it must be 2 or greater")
    check_form(given.output)
    pretrained = load(given.checkpoint, mesh, log, given.precision)
    model = pretrained.config.model
    asked = Asked(tuple(dict.fromkeys(given.include)), tuple(given.layers)).resolved(model.num_layers,
                                                                                     model.contact_head)
    asked = replace(asked, layers=tuple(dict.fromkeys(asked.layers)))
    work = Work(given.output, asked, given.window, given.tokens_per_row,
                "float16" if given.half else "float32")
    embed(work, pretrained, proteins_of(given, given.input, pretrained.vocab), log)


if __name__ == "__main__":
    leave(main())
