"""Runs a command on one rank or several: joins the other ranks, does the work, and turns errors into an exit status."""

import sys
from collections.abc import Callable
from functools import partial

from megatron.config import ParallelConfig
from megatron.errors import OutputError, UserError
from megatron.files import refusal
from megatron.log import STOPPED, Log, hush_matplotlib, take_any_text
from megatron.parallel.launch.environment import Launch, check_launch, launched
from megatron.parallel.launch.failure import refused, report
from megatron.parallel.mesh import Mesh, open_mesh
from megatron.parallel.sameness import check_same_flags


def status_of(prepare: Callable[[Launch], tuple[ParallelConfig, Callable[[Mesh, Log], None]]]) -> int:
    """Run a command on this rank; returns the exit status for `leave`.

    `prepare` returns the layout, which must be the same on all ranks, and the work, which is called with the mesh and
    the log. The status is 0, or 2 with one line for a mistake of the user's, 1 if a rank failed or lost the others, 130
    with one line after Ctrl-C.
    """
    take_any_text()
    hush_matplotlib()
    launch = Launch()
    try:
        launch = launched()
        parallel, work = prepare(launch)
        check_launch(launch)
    except (UserError, OSError) as error:
        return refused(error, launch)
    try:
        with open_mesh(parallel, launch, partial(check_same_flags, [("parallel", parallel)])) as mesh:
            work(mesh, Log(is_speaker=mesh.world.rank == 0))
    except KeyboardInterrupt:
        if launch.speaks():
            print(STOPPED, file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            return report(OutputError(refusal(error)), launch)
        return report(error, launch)
    return 0
