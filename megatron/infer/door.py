"""The flags that all programs have that ask models, and how these begin: alone, or as ranks of a launcher."""

import argparse
from collections.abc import Callable
from functools import partial

from megatron.config import ParallelConfig
from megatron.errors import ConfigError
from megatron.infer.pretrained import PRECISIONS
from megatron.log import Log
from megatron.parallel.launch.environment import Launch
from megatron.parallel.mesh import Mesh
from megatron.parallel.program import status_of


def add_model_flags(flags: argparse.ArgumentParser) -> None:
    """The flags of how a model computes."""
    group = flags.add_argument_group("model")
    group.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of what is computed (default: fp32)")
    group.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="N",
                       help="ranks that share each layer; what is left of a launcher's shares out the proteins")
    group.add_argument("--tokens-per-row", type=int, metavar="N",
                       help="computed at once (default: as memory allows, at most some thousands)")


def asked(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace, Mesh, Log], None]) -> int:
    """Run `work` with the flags, on this rank's mesh; the status as `status_of` has it."""
    def prepare(launch: Launch) -> tuple[ParallelConfig, Callable[[Mesh, Log], None]]:
        given = parser.parse_args()
        size = given.tensor_model_parallel_size
        if size < 1 or launch.size % size:
            raise ConfigError(f"--tensor-model-parallel-size is {size}; it must divide the number of ranks, "
                              f"{launch.size}")
        if given.tokens_per_row is not None and given.tokens_per_row < 1:
            raise ConfigError(f"--tokens-per-row is {given.tokens_per_row}; it must be 1 or greater")
        return ParallelConfig(tensor_model_parallel_size=size), partial(work, given)

    return status_of(prepare)
