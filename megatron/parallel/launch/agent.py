"""The launcher: starts ranks as `torchrun` does, with the same arguments (`python -m megatron.parallel.launch`).

A stop signal (SIGTERM, SIGINT, SIGHUP, SIGUSR1) is passed to the ranks as SIGTERM: they save and end with success, and
then so does the launcher. A second Ctrl-C interrupts them. torchrun would give them 30 seconds and call it a failure.

It prints one line that says which rank failed, on which host and why. A rank that was killed cannot say so itself; one
that failed leaves its line for the launcher (RANKS_REPORT_TO_LAUNCHER and `megatron.parallel.launch.failure`), which
distinguishes the cause from ranks that only lost their peers. The launchers of several hosts inform each other, so that
all end, or restart, at once. torchrun itself prints forty lines around the traceback of some rank of the host, and
nothing if it restarts the ranks.
"""

import logging
import os
import signal
import socket
import sys
import time
import uuid
from argparse import Namespace
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed.launcher.api as launcher
from torch.distributed import DistError, Store
from torch.distributed.elastic.agent.server import api as agent_api
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.run import config_from_args, get_rdzv_endpoint, parse_args, parse_min_max_nnodes

from megatron.errors import DivergedError, LaunchError, SaveError, UserError
from megatron.log import take_any_text
from megatron.parallel.launch.failure import INTERRUPTED
from megatron.parallel.launch.hosts import LOOPBACK, check_address
from megatron.parallel.launch.killed import count_oom_kills, killed_by
from megatron.parallel.launch.machines import find, meet, telling_a_long_wait, timeout_of
from megatron.parallel.launch.stop_signals import StopSignals, listens

# A rank that lost a peer often ends before the peer has recorded why. After a failure the other ranks have GRACE_S to
# end by themselves, then PATIENCE_S to obey SIGTERM, and are then killed as hanging.
GRACE_S, PATIENCE_S = 2, 5
INTERRUPT_EVERY_S = 1.0  # a rank takes its first SIGINT as a stop signal, and several that come at once as one
RESTART_S = 60  # launchers wait at least so long for each other before a restart: each first ends its ranks
LISTENING_S = 1  # time for the other launchers to read a message: the store ends with the first host's launcher
# Exit statuses after which a restart would only fail again.
NOT_AGAIN = (UserError.exit_status, DivergedError.exit_status, SaveError.exit_status)
AS_ASKED = "0 "  # the message of a launcher that was asked to stop before its ranks were restarted
DEFAULT_PORT = 29500  # torchrun's


class Agent(LocalElasticAgent):
    """torchrun's agent, extended: it says at once why ranks failed, also when it restarts them."""

    def __init__(self, signals: StopSignals, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._signals, self._asked, self._interrupted_at_s = signals, set[int](), -INTERRUPT_EVERY_S

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        if self._signals.has_come:  # a stop signal, since the last ranks ended
            self._tell(store_of_launchers(worker_group), AS_ASKED)
            sys.exit(0)
        with self._signals.without_ranks(), telling_a_long_wait():
            super()._rendezvous(worker_group)
        self._num_oom_kills = count_oom_kills()

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        context, store, hung = self._pcontext, store_of_launchers(worker_group), set[int]()
        word = self._word_of_others(store, wait_s=0)
        if isinstance(context, SubprocessContext):
            if self._signals.has_come:
                self._asked |= ask_to_stop(context, self._asked)
            if self._signals.num_interrupts > 1 and time.monotonic() - self._interrupted_at_s >= INTERRUPT_EVERY_S:
                self._interrupted_at_s = time.monotonic()
                ask_to_stop(context, set(), signal.SIGINT)
            if word or has_failed(context):
                hung = end_ranks(context)
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            rank, failure = cause(result.failures)
            has_lost_peers = reason(failure)[0] == "LostPeersError"
            if has_lost_peers and not word:
                word = self._word_of_others(store, wait_s=GRACE_S + PATIENCE_S + 1)
            if not word:
                num_oom_kills = count_oom_kills() - self._num_oom_kills
                word = f"{failure.exitcode} {line_of(rank, failure, failure.local_rank in hung, num_oom_kills)}"
                if not has_lost_peers:
                    self._tell(store, word)
            self._conclude(word, worker_group.spec.max_restarts)
        return result

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        """When other machines join, let the ranks save and end first, however long it takes: torchrun gives 30 s."""
        context, asked = self._pcontext, set[int]()
        while isinstance(context, SubprocessContext) and are_running(context) and not has_failed(context):
            asked |= ask_to_stop(context, asked)
            time.sleep(0.05)
        super()._stop_workers(worker_group)

    def _tell(self, store: Store | None, word: str) -> None:
        if store is not None:
            store.set(self._key(), word)
            time.sleep(LISTENING_S)

    def _word_of_others(self, store: Store | None, wait_s: float) -> str:
        """Exit status and line of a failure on another host; empty if no launcher reports one within `wait_s`."""
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
        if word == AS_ASKED:
            sys.exit(0)
        status, _, line = word.partition(" ")
        if int(status) in NOT_AGAIN or self._asked:
            self._remaining_restarts = 0
        if self._remaining_restarts:
            line += f"; starting again, restart {max_restarts - self._remaining_restarts + 1} of {max_restarts}"
        if line:
            print(line if int(status) == INTERRUPTED else f"error: {line}", file=sys.stderr, flush=True)


def store_of_launchers(worker_group: WorkerGroup) -> Store | None:
    """The store in which the launchers of several hosts leave each other messages; None on one host."""
    return worker_group.store if (worker_group.group_world_size or 1) > 1 else None


def has_failed(context: SubprocessContext) -> bool:
    """Whether a rank on this host has failed."""
    return any(handler.proc.poll() for handler in context.subprocess_handlers.values())


def are_running(context: SubprocessContext) -> bool:
    """Whether a rank on this host is still running."""
    return any(handler.proc.poll() is None for handler in context.subprocess_handlers.values())


def ask_to_stop(context: SubprocessContext, asked: set[int], number: int = signal.SIGTERM) -> set[int]:
    """Sends a signal to the ranks on this host that handle SIGTERM and are not among `asked`; returns these ranks.

    A rank that does not handle it yet, or no longer as it has saved and is about to end, would die of it.
    """
    listening = {rank: handler.proc for rank, handler in context.subprocess_handlers.items()
                 if rank not in asked and handler.proc.poll() is None and listens(handler.proc.pid)}
    for process in listening.values():
        process.send_signal(number)
    return set(listening)


def end_ranks(context: SubprocessContext) -> set[int]:
    """Ends the ranks on this host; returns the local ranks that had to be killed."""
    processes = {rank: handler.proc for rank, handler in context.subprocess_handlers.items()}
    deadline_s = time.monotonic() + GRACE_S
    while any(process.poll() is None for process in processes.values()) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    running = {rank for rank, process in processes.items() if process.poll() is None}
    context.close(timeout=PATIENCE_S)
    return {rank for rank in running if processes[rank].returncode == -signal.SIGKILL}


def cause(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank that failed first, and its failure: not one that only lost its peers or was asked to end."""
    def order(rank: int) -> tuple[int, int]:
        failure = failures[rank]
        follows = 2 if failure.exitcode == -signal.SIGTERM else 1 if reason(failure)[0] == "LostPeersError" else 0
        return follows, failure.timestamp

    rank = min(failures, key=order)
    return rank, failures[rank]


def reason(failure: ProcessFailure) -> tuple[str, str]:
    """The type and the text of the exception that the rank has recorded; empty if it has recorded none."""
    if not isinstance(failure.message, dict):
        return "", ""
    kind, _, text = failure.message["message"].partition(": ")
    return kind, text


def line_of(rank: int, failure: ProcessFailure, has_hung: bool, num_oom_kills: int = 0) -> str:
    """The line to print about a failure, as `killed_by` has it; empty if the rank has printed it itself."""
    _, line = reason(failure)
    where = f"rank {rank} on {socket.gethostname()}"
    if line or failure.exitcode in NOT_AGAIN:
        return line
    if has_hung:
        return f"{where}: did not answer, and was killed"
    if failure.exitcode < 0:
        return f"{where}: {killed_by(-failure.exitcode, num_oom_kills)}"
    return f"{where}: ended with exit status {failure.exitcode}"


def meet_on_this_host(args: Namespace) -> None:
    """Completes the arguments of a launcher that is alone, as torchrun does, but with the loopback address.

    torchrun would use this host's name, which nothing else needs, and which does not resolve on some machines.
    """
    if parse_min_max_nnodes(args.nnodes)[1] > 1 and not args.standalone:
        return
    args.local_addr = args.local_addr or LOOPBACK
    has_port = args.master_port not in (None, DEFAULT_PORT)  # PyTorch 2.11 fills in the default
    if args.standalone or (args.rdzv_backend == "static" and not args.rdzv_endpoint and not has_port):
        args.standalone = False
        args.rdzv_backend, args.rdzv_endpoint, args.rdzv_id = "c10d", f"{LOOPBACK}:0", str(uuid.uuid4())


def prepared(argv: Sequence[str]) -> tuple[launcher.LaunchConfig, Any, list[str]]:
    """torchrun's configuration, the program to start and its arguments; raises LaunchError if launchers cannot meet."""
    args = parse_args(argv)
    try:
        meet_on_this_host(args)
        args.master_port = DEFAULT_PORT if args.master_port is None else args.master_port
        if args.rdzv_backend in ("static", "c10d") and "file" not in args.rdzv_conf:
            check_address(parse_rendezvous_endpoint(get_rdzv_endpoint(args), DEFAULT_PORT)[0])
        args.signals_to_handle = "SIGQUIT"  # `StopSignals` handles the others
        least, most = parse_min_max_nnodes(args.nnodes)
        if least < most:
            # In torch 2.13 hosts that join later are not told the store that the launcher shares with its ranks, and
            # would wait forever. So rank 0 creates one of its own.
            os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        config, command, arguments = config_from_args(args)
    except UserError:
        raise
    except OSError as error:
        raise LaunchError(f"the launcher finds no folder for its ranks' reports ({error}); let the environment "
                          "variable TMPDIR name a folder with room, or give --log-dir") from error
    except (ValueError, RuntimeError, AssertionError) as error:
        raise LaunchError(f"the launcher's arguments do not fit: {str(error).splitlines()[0]}") from error
    if "timeout" not in args.rdzv_conf:
        config.rdzv_configs["timeout"] = max(RESTART_S, int(timeout_of(arguments).total_seconds()))
    return config, command, arguments


def met(config: launcher.LaunchConfig, timeout: timedelta) -> Store | None:
    """Waits for the launchers that torch would wait for; returns the store to hold while ranks run, if it is here.

    Raises LaunchError if they cannot meet, and DistError if they do not within `timeout`.
    """
    address, port = parse_rendezvous_endpoint(config.rdzv_endpoint, DEFAULT_PORT)
    if config.rdzv_backend == "static":
        return meet(config.rdzv_configs["rank"], config.max_nodes, address, port, timeout)
    kept, conf = None, config.rdzv_configs
    if config.rdzv_backend == "c10d" and port != 0 and conf.keys().isdisjoint({"is_host", "store_type"}):
        kept = find(address, port, timeout)
        conf["is_host"] = kept is not None  # torch would look this host's own name up, which may not resolve
    return kept


def main(argv: Sequence[str], signals: StopSignals) -> int:
    """Runs the ranks; returns the exit status of the one that failed, in a shell's convention: 128 + N for signal N."""
    take_any_text()
    os.environ["RANKS_REPORT_TO_LAUNCHER"] = "1"
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    # torch has no other way to replace its agent; and it looks its host's name up at every event, only for a log.
    vars(launcher)["LocalElasticAgent"] = partial(Agent, signals)
    vars(agent_api)["_get_fq_hostname"] = socket.gethostname
    try:
        config, command, arguments = prepared(argv)
        kept = met(config, timeout_of(arguments))
        launcher.elastic_launch(config, command)(*arguments)
        del kept
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = error.exit_status
    except ChildFailedError as failed:
        status = cause(failed.failures)[1].exitcode
    except SignalException as stopped:
        status = -stopped.sigval
    except (RendezvousError, DistError) as error:
        print(f"error: the launcher on {socket.gethostname()} lost the others, or did not find them: "
              f"{next(iter(str(error).splitlines()), type(error).__name__)}", file=sys.stderr)
        status = 1
    else:
        status = 0
    return status if status >= 0 else 128 - status
