"""Ends a rank's process."""

import atexit
import gc
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from megatron.parallel.launch.environment import is_alone, status_file


def leave(exit_status: int) -> NoReturn:
    """Ends the process after the functions registered with `atexit`: whatever must be finished first belongs there.

    With several ranks it skips the interpreter's own shutdown. gloo's threads live as long as anything refers to a
    process group, and need the interpreter's lock to free tensors: a thread that asks for it too late aborts the
    process ("terminate called without an active exception", in one of a hundred finished runs).
    """
    _tell(exit_status)
    if is_alone():
        if "triton" not in sys.modules:  # since 3.9 it reports what is not freed at the end as leaks, in 30 lines
            gc.freeze()  # or Python would at last search all of torch for garbage, which takes half a second
        sys.exit(exit_status)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_status)


def _tell(exit_status: int) -> None:
    """Write a status after which nothing must be restarted to the file that a batch script named, if one did.

    srun's own exit status may be that of the other tasks, which it then kills.
    """
    place = status_file()
    if place is not None and 1 < exit_status < 128:
        with suppress(OSError):
            Path(place).parent.mkdir(parents=True, exist_ok=True)
            Path(place).write_text(f"{exit_status}\n")
