"""Run a function on several gloo ranks of this machine, in processes that have torch loaded already."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.parallel.mesh import Axis

TIMEOUT_S = 60
TIMEOUT = timedelta(seconds=TIMEOUT_S)
# What each process has when it starts: torch with what its optimizers and collectives import late, and for whole runs
# the program with what its first rank imports late.
PRELOADED = ["torch", "torch._dynamo", "torch.distributed.fsdp", "torch.utils.tensorboard", "matplotlib.pyplot",
             "pretrain_tape"]


def run_ranks(function: Callable[..., Any], num_ranks: int, *arguments: Any) -> list[Any]:
    """What `function(axis, *arguments)` returned on each rank, in their order; raises where a rank fails."""
    context = warm_processes()
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_one_rank, args=(function, rank, num_ranks, folder, arguments))
                     for rank in range(num_ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(TIMEOUT_S)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        assert codes == [0] * num_ranks, f"exit codes of the ranks: {codes}"
        return [torch.load(Path(folder) / f"result-{rank}.pt", weights_only=True) for rank in range(num_ranks)]


def warm_processes() -> ForkServerContext:
    """Starts processes in a tenth of a second."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _one_rank(function: Callable[..., Any], rank: int, num_ranks: int, folder: str, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{folder}/store", num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=TIMEOUT)
    result = function(Axis(rank, num_ranks, dist.group.WORLD), *arguments)
    torch.save(result, f"{folder}/result-{rank}.pt")
    dist.destroy_process_group()
