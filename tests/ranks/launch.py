"""Runs a function on several gloo ranks of this machine, in processes that stay alive and have loaded torch already."""

import io
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing import connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

import torch
import torch.distributed as dist

from megatron.parallel.mesh import Axis

TIMEOUT_S = 60
TIMEOUT = timedelta(seconds=TIMEOUT_S)
# Modules that each process has loaded when it starts: torch and what its optimizers and collectives import lazily, and
# for whole runs the program and what its first rank imports lazily.
PRELOADED = ["torch", "torch._dynamo", "torch.distributed.fsdp", "torch.utils.tensorboard", "matplotlib.figure",
             "pretrain_tape"]


def run_ranks(function: Callable[..., Any], num_ranks: int, *arguments: Any) -> list[Any]:
    """What `function(axis, *arguments)` returned on each rank, in the order of ranks; raises if a rank fails.

    `axis`: the Axis of all ranks, over gloo. The results pass through torch.save.
    """
    with tempfile.TemporaryDirectory() as folder:
        answers = on_processes(_one_rank, num_ranks, folder, function, *arguments)
    results = [answer for answer in answers if isinstance(answer, bytes)]
    assert len(results) == num_ranks, f"exit codes of the ranks that ended: {set(answers) - set(results)}"
    return [torch.load(io.BytesIO(result), weights_only=True) for result in results]


def on_processes(function: Callable[..., bytes], number: int, *arguments: Any) -> list[bytes | int | None]:
    """What `function(process number, number of processes, *arguments)` returned in each of `number` processes.

    For a process that ended, its exit code instead; for one that hangs, None. Calls reuse the same processes until one
    of them fails, because starting a process, and its first training step, take seconds.
    """
    workers = _workers()
    workers += [_Worker() for _ in range(number - len(workers))]
    busy = workers[:number]
    for rank, worker in enumerate(busy):
        worker.connection.send((function, (rank, number, *arguments)))
    deadline_s = time.monotonic() + 4 * TIMEOUT_S
    answers = [worker.answer(deadline_s) for worker in busy]
    if not all(isinstance(answer, bytes) for answer in answers):
        end_processes()
    return answers


def end_processes() -> None:
    """Let the next call start its processes anew."""
    for worker in _workers():
        worker.process.kill()
    _workers().clear()


def warm_processes() -> ForkServerContext:
    """A multiprocessing context that starts processes with PRELOADED in a tenth of a second."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class _Worker:
    """A process that runs the functions that it is sent, one after another."""

    def __init__(self) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        self.process: ForkServerProcess = warm_processes().Process(target=_work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def answer(self, deadline_s: float) -> bytes | int | None:
        """The bytes that the function returned; the exit code if the process ended; None if neither by the deadline."""
        if not self.connection.poll(max(0.0, deadline_s - time.monotonic())):
            return None
        try:
            return self.connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            self.process.join(TIMEOUT_S)
            return self.process.exitcode


@cache
def _workers() -> list[_Worker]:
    """The processes of this session of pytest."""
    return []


def _work(parent: connection.Connection) -> None:
    """Run the functions that the parent sends, until it is gone."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    while True:
        try:
            function, arguments = parent.recv()
        except EOFError:
            return
        parent.send_bytes(function(*arguments))


def _one_rank(rank: int, num_ranks: int, folder: str, function: Callable[..., Any], *arguments: Any) -> bytes:
    """Run `function` as one rank of a gloo group that meets in `folder`; returns its result as torch.save writes it."""
    store = dist.FileStore(f"{folder}/store", num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=TIMEOUT)
    dist.barrier()  # a rank that returned at once would end the group before the others had connected to it
    result = io.BytesIO()
    torch.save(function(Axis(rank, num_ranks, dist.group.WORLD), *arguments), result)
    dist.destroy_process_group()
    return result.getvalue()
