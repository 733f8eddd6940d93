"""Checks the ranks of a job: whether their hosts agree, how much their clocks differ, how fast their links are."""

import hashlib
import platform
import socket
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch

from megatron.doctor.data import sizes
from megatron.doctor.finding import NOTE, OK, ROOT, WRONG, Finding
from megatron.log import number_of
from megatron.parallel.collectives import all_gather_object, all_reduce_sum
from megatron.parallel.mesh import Mesh

_MOST_SKEW_S = 2.0
_ROUNDS = 9
_SOURCES = ("pretrain_tape.py", "setup.py", *(f"{folder}/**/*.{ending}" for folder in (
    "megatron", "tools", "protein_tools") for ending in ("py", "cpp", "h", "inc", "txt")))
# The remedy for each fact that hosts may disagree on.
_REMEDIES = {"Python": "PYTHON=/path/to/python3 bash examples/setup.sh run", "torch": "pip install torch==VERSION",
             "NCCL": "pip install torch==VERSION", "sources": "git checkout COMMIT, and git status --short",
             "data": "rsync -a --checksum FOLDER/ HOST:FOLDER/", "GPU": "python tools/plan_layout.py --help"}


def facts(data_path: tuple[str, ...]) -> dict[str, Any]:
    """The facts that must be the same on all hosts, by name."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none"
    return {"Python": platform.python_version(), "torch": torch.__version__, "NCCL": nccl,
            "sources": f"{commit()} ({checksum()[:12]})", "data": sizes(data_path), "GPU": gpu}


def commit() -> str:
    """The commit of the checkout, or "no git" or "no commit"."""
    try:
        said = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                              check=False, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "no git"
    return said.stdout.strip() or "no commit"


def checksum() -> str:
    """SHA-256 over the names and contents of the project's sources."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _SOURCES for path in ROOT.glob(pattern)):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def job(data_path: tuple[str, ...], mesh: Mesh) -> list[Finding]:
    """The findings on the job as a whole; all ranks call this together, and get the same."""
    hosts = all_gather_object(socket.gethostname(), mesh.world)
    return [*agreement(hosts, all_gather_object(facts(data_path), mesh.world)), _clocks(hosts, mesh), *_links(mesh)]


def agreement(hosts: Sequence[str], of_ranks: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    """A finding for each fact that differs between ranks, or one that all agree."""
    agreed = True
    for name in of_ranks[0]:
        hosts_of: dict[str, dict[str, None]] = defaultdict(dict)
        for host, facts_of_rank in zip(hosts, of_ranks, strict=True):
            hosts_of[str(facts_of_rank[name])][host] = None
        if len(hosts_of) > 1:
            agreed = False
            groups = "; ".join(f"{value[:60]} on {', '.join([*told][:4])}{' …' if len(told) > 4 else ''}"
                               for value, told in hosts_of.items())
            yield Finding(NOTE if name == "GPU" else WRONG, f"{name} differs: {groups}", _REMEDIES[name])
    if agreed:
        shared = ", ".join(f"{name} {value}" for name, value in of_ranks[0].items() if name != "data" and value)
        yield Finding(OK, f"{len(hosts)} ranks on {number_of(len(set(hosts)), 'host')} agree: "
                      f"{shared}{', sizes of all data files' if of_ranks[0]['data'] else ''}")


def _clocks(hosts: Sequence[str], mesh: Mesh) -> Finding:
    """The largest clock difference to rank 0, measured at the end of all-reduces, which all ranks leave together."""
    differences = []
    for _ in range(_ROUNDS):
        _summed(1, mesh)
        now = all_gather_object(time.time(), mesh.world)
        differences.append([there - now[0] for there in now])
    skews = [median(of_rank) for of_rank in zip(*differences, strict=True)]
    rank = max(range(len(skews)), key=lambda rank: abs(skews[rank]))
    text = f"clocks: {hosts[rank]} differs by {skews[rank]:.3f} s from {hosts[0]}"
    if abs(skews[rank]) > _MOST_SKEW_S:
        return Finding(NOTE, f"{text}: times in logs and the age of locks mislead", "timedatectl set-ntp true")
    return Finding(OK, text)


def _links(mesh: Mesh) -> Iterator[Finding]:
    """The latency and bandwidth of all-reduces over all n ranks; the bandwidth counts 2 (n - 1) / n of the bytes."""
    num_bytes = (1 << 28) if mesh.device.type == "cuda" else 1 << 24
    own = [median(_summed(count, mesh) for _ in range(_ROUNDS)) for count in (1, num_bytes // 4)]
    latency_s, seconds = map(max, zip(*all_gather_object(own, mesh.world), strict=True))
    size = mesh.world.size
    rate = 2 * (size - 1) / size * num_bytes / seconds / 1e9
    yield Finding(OK, f"sums over {size} ranks by {'NCCL' if mesh.device.type == 'cuda' else 'gloo'}: "
                  f"{latency_s * 1e6:.0f} µs for one number, {rate:.2f} GB/s a rank for {num_bytes >> 20} MiB")


def _summed(count: int, mesh: Mesh) -> float:
    """The seconds that an all-reduce of `count` fp32 numbers takes on this rank."""
    numbers = torch.ones(count, device=mesh.device)
    _wait(mesh)
    began_s = time.perf_counter()
    all_reduce_sum(numbers, mesh.world)
    _wait(mesh)
    return time.perf_counter() - began_s


def _wait(mesh: Mesh) -> None:
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)
