"""How a rank ends: its process, not only its work."""

import atexit
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from megatron.parallel.launch.environment import is_alone, status_file


def leave(exit_status: int) -> NoReturn:
    """Ends the process, after what is registered with `atexit`: whatever has to be finished first belongs there.

    A rank among others ends without the interpreter's own end. gloo's threads live as long as anything refers to a
    group, and free tensors, for which they need the interpreter's lock: one that asks for it too late aborts the
    process ("terminate called without an active exception", one of a hundred finished runs).
    """
    _tell(exit_status)
    if is_alone():
        sys.exit(exit_status)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_status)


def _tell(exit_status: int) -> None:
    """Leave a status that stands for a mistake, not for a failure, where a script asks for it.

    srun's own is that of the other tasks, which it then ends by force.
    """
    place = status_file()
    if place is not None and 1 < exit_status < 128:
        with suppress(OSError):
            Path(place).parent.mkdir(parents=True, exist_ok=True)
            Path(place).write_text(f"{exit_status}\n")
