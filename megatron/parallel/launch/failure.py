"""What a rank prints when it fails: one line with its number, its host and the reason.

A rank that only lost its peers, or a process of its own, prints no traceback: the cause is not in its code.
"""

import hashlib
import re
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from megatron.errors import ConfigFileError, LaunchError, UserError
from megatron.parallel.launch.environment import Launch
from megatron.parallel.launch.hosts import answers
from megatron.parallel.launch.killed import CUT_SHORT

OTHERS_S = 2.0  # how long rank 0 waits for others that fail as it does
OTHERS_LISTEN_S = 5.0  # how long a rank with a mistake in its flags looks whether rank 0 has it, too
INTERRUPTED = 130  # the exit status of a program that Ctrl-C ends, in a shell's convention
# In error messages of gloo, NCCL and the store: another rank has gone, or has not come.
_LOST_PEERS = re.compile(r"closed by peer|reset by peer|broken pipe|connection refused|connection was likely closed|"
                         r"connection .{0,20}(closed|lost)|socket (closed|timeout)|timed out|wait timeout|pair closure|"
                         r"remote process exited|failed to (recv|connect)|store .{0,20}closed", re.IGNORECASE)
# In those of a DataLoader's SIGCHLD handler: the kernel, or a person, has ended a worker.
_LOST_WORKER = re.compile(r"DataLoader worker \(pid \d+\) is killed by signal: (Killed|Bus error)")


class RankError(RuntimeError):
    """Carries the line that says why a rank failed."""


class LostPeersError(RankError):
    """Carries the line of a rank that failed because another has gone, or did not answer in time."""


class LostWorkerError(RankError):
    """Carries the line of a rank that failed because a process that prepares its batches was killed."""


def refused(error: UserError | OSError, launch: Launch) -> int:
    """Prints a mistake of the user's that was found before ranks have met; returns the exit status.

    Ranks are taken to have the same flags, and those of one host the same environment and files, so that one prints for
    all. But one for which rank 0 waits has flags of its own, and prints, too.
    """
    is_of_host = isinstance(error, LaunchError | ConfigFileError | OSError)
    if launch.speaks_for_host() if is_of_host else launch.speaks():
        print(f"error: {error}", file=sys.stderr)
    elif not is_of_host and _is_awaited(launch):
        print(f"error: {_reason(error, launch)}", file=sys.stderr)
    return 2


def report(error: Exception, launch: Launch) -> int:
    """Reports to user and launcher why this rank fails; call it inside the `except` clause. Returns the exit status.

    A mistake of the user's, lost peers and lost workers take one line; anything else a traceback and one line.
    """
    if isinstance(error, RuntimeError) and "EADDRINUSE" in str(error):
        error = LaunchError(f"port {launch.master_port} is taken; set MASTER_PORT to a free one")
    is_of_user = isinstance(error, UserError)
    reason = _reason(error, launch)
    if not (is_of_user or isinstance(reason, LostPeersError | LostWorkerError)):
        sys.stderr.write(traceback.format_exc())
    get_error_handler().record_exception(reason)  # megatron/parallel/launch/agent.py reads it
    if not (launch.is_heard or isinstance(error, UserError) and error.is_told):
        sys.stderr.write(f"error: {reason}\n")
    return error.exit_status if isinstance(error, UserError) else 1


def _is_awaited(launch: Launch) -> bool:
    """Whether rank 0 listens for the other ranks, now or within a few seconds: then it has not failed as this one has.

    False under launchers that give all ranks the same flags, and whose agent listens in its place.
    """
    if launch.is_heard or launch.has_agent or launch.master_addr is None or launch.master_port is None:
        return False
    return answers(launch.master_addr, launch.master_port, OTHERS_LISTEN_S)


@contextmanager
def told_once(store: dist.Store, launch: Launch) -> Iterator[None]:
    """A context that prints a mistake of the user's on one rank only, where several raise it with the same text.

    The first of them prints it, under torchrun the first of each host, whose output is its own. A rank that cannot ask
    the others' `store` leaves the printing to `report`, so that no message is lost.
    """
    try:
        yield
    except UserError as error:
        if not launch.is_heard:
            with suppress(dist.DistError):
                _tell_once(error, store, launch)
        raise


def _tell_once(error: UserError, store: dist.Store, launch: Launch) -> None:
    """Print the error unless another rank has; raises DistError if rank 0, which keeps the store, has gone."""
    key = f"told/{hashlib.blake2b(str(error).encode(errors='replace'), digest_size=16).hexdigest()}"
    where = socket.gethostname() if launch.launcher == "torchrun" else ""
    if store.add(f"{key}/{where}", 1) == 1:
        sys.stderr.write(f"error: {_reason(error, launch)}\n")
        sys.stderr.flush()
    error.is_told = True
    store.add(key, 1)  # of all hosts
    until_s = time.monotonic() + OTHERS_S
    while launch.rank == 0 and store.add(key, 0) < launch.size and time.monotonic() < until_s:
        time.sleep(0.02)  # the store goes with this rank, and the others still have to ask


def interrupted(line: str, launch: Launch) -> int:
    """Reports to user and launcher that Ctrl-C has ended this rank, by `line`; returns the exit status."""
    get_error_handler().record_exception(RankError(line))
    if launch.speaks() and not launch.is_heard:
        print(line, file=sys.stderr)
    return INTERRUPTED


def _reason(error: Exception, launch: Launch) -> RankError:
    """Which rank failed, where and why."""
    where = f"rank {launch.rank} on {socket.gethostname()}"
    if isinstance(error, UserError):
        return RankError(str(error) if launch.size == 1 else f"{error} ({where})")
    text = next(iter(str(error).splitlines()), "")
    if (isinstance(error, dist.DistError) or "/gloo/" in text) and _LOST_PEERS.search(text):
        # Without gloo's source location and its advice.
        text = re.sub(r"^\[\S+:\d+\] ", "", text).split(". This is typically")[0]
        return LostPeersError(f"{where} lost its peers: {text}")
    # The loader may raise its own error from that of the handler.
    lost = [found for one in (error, error.__cause__) if isinstance(one, RuntimeError)
            and (found := _LOST_WORKER.search(str(one)))]
    if lost:
        what = f"{where}: a process that prepares batches was killed"
        return LostWorkerError(f"{what} (signal 7), probably because {CUT_SHORT}" if lost[0][1] == "Bus error" else
                               f"{what} (signal 9), probably for want of memory: give more memory, or --num-workers 0")
    return RankError(f"{where}: {type(error).__name__}: {text}")
