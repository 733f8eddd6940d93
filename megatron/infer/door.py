"""How a program that asks models begins and ends: alone, or as one of the ranks that a launcher started."""

import argparse
import sys
from collections.abc import Callable
from functools import partial

from megatron.config import ParallelConfig
from megatron.errors import ConfigError, LaunchError, OutputError, UserError
from megatron.infer.pretrained import PRECISIONS
from megatron.log import Log, take_any_text
from megatron.parallel.launch.environment import Launch, check_launch, launched
from megatron.parallel.launch.failure import report
from megatron.parallel.mesh import Mesh, joined


def add_model_flags(flags: argparse.ArgumentParser) -> None:
    """The flags of how a model computes."""
    group = flags.add_argument_group("model")
    group.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of what is computed (default: fp32)")
    group.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="N",
                       help="ranks that share each layer; what is left of a launcher's shares out the proteins")
    group.add_argument("--tokens-per-row", type=int, metavar="N",
                       help="computed at once (default: as memory allows, at most some thousands)")


def asked(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace, Mesh, Log], None]) -> int:
    """Run `work` with the flags, on this rank's mesh; the status with which the process is to `leave`.

    0; 2 and one line for a mistake of the user's; 1 where a rank failed or lost the others; 130 after Ctrl-C.
    """
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


def status_of(prepare: Callable[[Launch], tuple[ParallelConfig, Callable[[Mesh, Log], None]]]) -> int:
    """The exit status of work on this rank's mesh, as `asked` has it; `prepare` gives the layout and the work."""
    take_any_text()
    launch = Launch()
    try:
        launch = launched()
        parallel, work = prepare(launch)
        check_launch(launch)
    except UserError as error:
        if launch.speaks_for_host() if isinstance(error, LaunchError) else launch.speaks():
            print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        with joined(parallel, launch) as mesh:
            work(mesh, Log(is_speaker=mesh.world.rank == 0))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        is_of_file = isinstance(error, OSError) and error.filename is not None
        return report(OutputError(str(error)) if is_of_file else error, launch)
    return 0
