"""How a rank ends: its process, not only its work."""

import atexit
import os
import sys
from typing import NoReturn

from megatron.parallel.launch.environment import is_alone


def leave(exit_status: int) -> NoReturn:
    """Ends the process, after what is registered with `atexit`: whatever has to be finished first belongs there.

    A rank among others ends without the interpreter's own end. gloo's threads live as long as anything refers to a
    group, and free tensors, for which they need the interpreter's lock: one that asks for it too late aborts the
    process ("terminate called without an active exception", one of a hundred finished runs).
    """
    if is_alone():
        sys.exit(exit_status)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_status)
