"""Flags that all inference programs share, and how these programs start: alone, or as ranks of a launcher."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron.config import ParallelConfig
from megatron.config.command_line import add_section_flags, check_section
from megatron.data.corpus.vocab import Vocab
from megatron.errors import ConfigError
from megatron.files import leaving_no_empty
from megatron.infer.pretrained import PRECISIONS
from megatron.infer.proteins import ProteinFiles
from megatron.infer.rows import MOST_TOKENS
from megatron.infer.skipped import FLAG
from megatron.log import Log
from megatron.parallel.launch.environment import Launch
from megatron.parallel.mesh import Mesh
from megatron.parallel.program import status_of


def add_model_flags(flags: argparse.ArgumentParser) -> None:
    """Add the flags for precision, row size and layout."""
    group = flags.add_argument_group("model")
    group.add_argument("--precision", choices=PRECISIONS, default="fp32",
                       help="precision of the computation (default: fp32)")
    group.add_argument("--tokens-per-row", type=int, metavar="N",
                       help="tokens computed at once (default: as memory allows, at most "
                       f"{MOST_TOKENS['cpu']:,} on CPUs and {MOST_TOKENS['cuda']:,} on GPUs)")
    add_layout_flags(flags)


def add_protein_flags(flags: argparse.ArgumentParser, has_names: bool = True) -> None:
    """Add the flags for reading files of proteins, which `proteins_of` uses.

    `has_names`: whether the program needs a name for each protein; without it there is no --name-key.
    """
    flags.add_argument("--json-key", "--json-keys", default="text",
                       help="key or column of the sequence, if records have several (default: text)")
    if has_names:
        flags.add_argument("--name-key",
                           help="key or column of the name (default: proteins without a name are numbered)")
    add_skipping_flag(flags)
    flags.set_defaults(has_names=has_names)


def add_skipping_flag(flags: argparse.ArgumentParser) -> None:
    """Add preprocessing's flag for leaving out bad records."""
    flags.add_argument(FLAG, action="store_true", help="leave out, count and report records that cannot be read, "
                       "instead of stopping at the first")


def proteins_of(given: argparse.Namespace, paths: Sequence[str], vocab: Vocab) -> ProteinFiles:
    """The proteins of files, read as the flags say. If the program needs names, two proteins of the same name are an
    error.
    """
    return ProteinFiles(paths, given.json_key, given.name_key if given.has_names else None, vocab,
                        skips=given.skip_bad_records, are_named_apart=given.has_names)


def add_layout_flags(flags: argparse.ArgumentParser) -> None:
    """Add pretraining's flags for tensor parallelism and for how long ranks wait for each other."""
    names, defaults = ("tensor_model_parallel_size", "distributed_timeout_minutes"), ParallelConfig()
    add_section_flags(flags, ParallelConfig, names, {
        names[0]: "ranks that split each layer; the other ranks of the job share the proteins (default: 1)"})
    flags.set_defaults(**{name: getattr(defaults, name) for name in names})


def parallel_of(given: argparse.Namespace, launch: Launch) -> ParallelConfig:
    """The layout of the flags; raises ConfigError if it is impossible with the ranks that were launched."""
    size = given.tensor_model_parallel_size
    if size < 1 or launch.size % size:
        raise ConfigError(f"--tensor-model-parallel-size is {size}; it must divide the number of ranks, {launch.size}")
    parallel = ParallelConfig(tensor_model_parallel_size=size,
                              distributed_timeout_minutes=given.distributed_timeout_minutes)
    check_section(parallel)
    return parallel


def asked(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace, Mesh, Log], None]) -> int:
    """Run `work` with the parsed flags on this rank's mesh, and return the exit status as `status_of` does.

    The flags must include `output`.
    """
    def prepare(launch: Launch) -> tuple[ParallelConfig, Callable[[Mesh, Log], None]]:
        given = parser.parse_args()
        parallel = parallel_of(given, launch)
        if given.tokens_per_row is not None and given.tokens_per_row < 1:
            raise ConfigError(f"--tokens-per-row is {given.tokens_per_row}; it must be 1 or greater")

        def worked(mesh: Mesh, log: Log) -> None:
            with leaving_no_empty(given.output or Path()):
                work(given, mesh, log)

        return parallel, worked

    return status_of(prepare)
