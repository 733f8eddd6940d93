"""Starts ranks as `torchrun` does: `python -m megatron.parallel.launch.agent`, with the same arguments.

It says in one line which rank failed, where and why. A rank that was killed cannot say so itself; one that failed
leaves its line for the launcher (RANKS_REPORT_TO_LAUNCHER and `megatron.parallel.launch.failure`), which tells the
cause from ranks that only lost their peers. The launchers of several hosts tell each other, so that all end, or start
again, at once. torchrun's own report is forty lines around the traceback of any rank, on its own host, and nothing
where it starts them again.
"""

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping

import torch.distributed.launcher.api as launcher
from torch.distributed import DistError, Store
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.run import parse_args, run

from megatron.log import take_any_text

# A rank that lost a peer often ends before the peer has written down why. This long the others may take to end by
# themselves, and then to follow the request to end, before they are killed: what does not answer by then hangs.
GRACE_S, PATIENCE_S = 2, 5
LISTENING_S = 1  # the other launchers have heard by then; the store ends with the launcher of the first host
USER_ERROR = 2  # the exit status for a mistake of the user


class Agent(LocalElasticAgent):
    """torchrun's agent, which says why ranks failed at the time, also where it starts them again."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        context, store, hung = self._pcontext, store_of_launchers(worker_group), set[int]()
        word = self._word_of_others(store, wait_s=0)
        if isinstance(context, SubprocessContext) and (word or has_failed(context)):
            hung = end_ranks(context)
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            rank, failure = cause(result.failures)
            has_lost_peers = reason(failure)[0] == "LostPeersError"
            if has_lost_peers and not word:
                word = self._word_of_others(store, wait_s=GRACE_S + PATIENCE_S + 1)
            if not word:
                word = f"{failure.exitcode} {line_of(rank, failure, failure.local_rank in hung)}"
                if store is not None and not has_lost_peers:
                    store.set(self._key(), word)
                    time.sleep(LISTENING_S)
            self._conclude(word, worker_group.spec.max_restarts)
        return result

    def _word_of_others(self, store: Store | None, wait_s: float) -> str:
        """Exit status and line of a failure on another host; empty if its launcher leaves no word of one."""
        deadline_s = time.monotonic() + wait_s
        while store is not None:
            if store.check([self._key()]):
                return store.get(self._key()).decode()
            if time.monotonic() >= deadline_s:
                break
            time.sleep(0.05)
        return ""

    def _key(self) -> str:
        return f"failure/{self._remaining_restarts}"

    def _conclude(self, word: str, max_restarts: int) -> None:
        status, _, line = word.partition(" ")
        if int(status) == USER_ERROR:
            self._remaining_restarts = 0  # it would only repeat itself
        if self._remaining_restarts:
            line += f"; starting again, restart {max_restarts - self._remaining_restarts + 1} of {max_restarts}"
        if line:
            print(f"error: {line}", file=sys.stderr, flush=True)


def store_of_launchers(worker_group: WorkerGroup) -> Store | None:
    """Where the launchers of several hosts leave each other word; None on one host."""
    return worker_group.store if (worker_group.group_world_size or 1) > 1 else None


def has_failed(context: SubprocessContext) -> bool:
    """Whether a rank of this host has ended with a failure."""
    return any(handler.proc.poll() for handler in context.subprocess_handlers.values())


def end_ranks(context: SubprocessContext) -> set[int]:
    """Ends the ranks of this host; returns the local ranks that had to be killed."""
    processes = {rank: handler.proc for rank, handler in context.subprocess_handlers.items()}
    deadline_s = time.monotonic() + GRACE_S
    while any(process.poll() is None for process in processes.values()) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    running = {rank for rank, process in processes.items() if process.poll() is None}
    context.close(timeout=PATIENCE_S)
    return {rank for rank in running if processes[rank].returncode == -signal.SIGKILL}


def cause(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank, and its failure, that the others followed: not one that lost its peers or was asked to end."""
    def order(rank: int) -> tuple[int, int]:
        failure = failures[rank]
        follows = 2 if failure.exitcode == -signal.SIGTERM else 1 if reason(failure)[0] == "LostPeersError" else 0
        return follows, failure.timestamp

    rank = min(failures, key=order)
    return rank, failures[rank]


def reason(failure: ProcessFailure) -> tuple[str, str]:
    """The type and the text of the exception that the rank has recorded; empty where it has not."""
    if not isinstance(failure.message, dict):
        return "", ""
    kind, _, text = failure.message["message"].partition(": ")
    return kind, text


def line_of(rank: int, failure: ProcessFailure, has_hung: bool) -> str:
    """What to say of the failure; empty where the rank has already printed its one line."""
    _, line = reason(failure)
    where = f"rank {rank} on {socket.gethostname()}"
    if line or failure.exitcode == USER_ERROR:
        return line
    if has_hung:
        return f"{where}: did not answer, and was killed"
    if failure.exitcode < 0:
        return f"{where}: killed by signal {-failure.exitcode} ({failure.signal_name()})"
    return f"{where}: ended with exit status {failure.exitcode}"


def main() -> int:
    """Runs the ranks; returns the exit status of the one that failed, as a shell would give it."""
    take_any_text()
    os.environ["RANKS_REPORT_TO_LAUNCHER"] = "1"
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    vars(launcher)["LocalElasticAgent"] = Agent  # torch has no other way to give it one
    try:
        run(parse_args(None))
    except ChildFailedError as failed:
        status = cause(failed.failures)[1].exitcode
    except SignalException as stopped:
        status = -stopped.sigval
    except (RendezvousError, DistError) as error:
        print(f"error: the launcher on {socket.gethostname()} lost the others, or did not find them: "
              f"{str(error).splitlines()[0]}", file=sys.stderr)
        status = 1
    else:
        status = 0
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
