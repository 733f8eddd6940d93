"""Checks the processor, memory, limits and environment variables of this host, which must be Linux."""

import os
import re
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron.doctor.finding import NOTE, OK, ROOT, WRONG, Finding
from megatron.log import number_of
from megatron.parallel.launch.environment import is_alone

_GIB = 2**30
_TELLING_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
_MUCH_LOAD = 0.5  # running processes for each core
_FEW_FILES, _LEAST_SHM, _LEAST_MEMORY = 1024, 1 * _GIB, 2 * _GIB
_WATCHED = re.compile(r"(NCCL|GLOO|TORCH|PYTORCH|CUDA|OMP|GOMP|MKL|KMP|TRITON)_\w+|GLIBC_TUNABLES|MASTER_(ADDR|PORT)")


def processor() -> Iterator[Finding]:
    """Reports the processor's name, the cores that this process may use, and the relevant instruction sets."""
    text = _read("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", text)
    flags = set((re.search(r"^flags\s*: (.*)", text, re.MULTILINE) or [""])[0].split())
    has = [flag for flag in _TELLING_FLAGS if flag in flags]
    allowed, nodes = len(os.sched_getaffinity(0)), len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))
    yield Finding(OK, f"{name[1] if name else 'processor of no name'}: {allowed} of {os.cpu_count()} cores, "
                  f"{number_of(max(nodes, 1), 'NUMA node')}, {', '.join(has) or 'no AVX2'}")
    quota = cpu_quota()
    if quota is not None and quota < allowed:
        yield Finding(NOTE, f"the container may use {quota:g} of these cores: more threads wait for each other",
                      f"export OMP_NUM_THREADS={max(1, int(quota))}")
    load = os.getloadavg()[0]
    if load > _MUCH_LOAD * allowed:
        yield Finding(NOTE, f"other work is at these cores (load {load:.1f}): what is measured here is less than they "
                      "can do", "top")


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """The number of cores that the control group allows; None if there is no limit."""
    quota, period = [*_read(root / "cpu.max").split(), "", ""][:2]
    if not quota:
        quota, period = (_read(root / "cpu" / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def memory() -> Iterator[Finding]:
    """Reports the memory available to this process, and shared memory, which data workers and NCCL use."""
    free = available_memory()
    limit = _memory_limit()
    within = f", within the {limit / _GIB:.1f} GiB of the container" if limit else ""
    yield Finding(OK if free >= _LEAST_MEMORY else NOTE, f"memory: {free / _GIB:.1f} GiB free{within}",
                  None if free >= _LEAST_MEMORY else "ps aux --sort -rss | head")
    if Path("/dev/shm").is_dir():
        shm = shutil.disk_usage("/dev/shm").free
        yield Finding(OK if shm >= _LEAST_SHM else NOTE, f"shared memory: {shm / _GIB:.1f} GiB free in /dev/shm",
                      None if shm >= _LEAST_SHM else "docker run --ipc=host …, or mount -o remount,size=8G /dev/shm")


def available_memory() -> int:
    """The bytes that this process can still allocate, by the system and by its control group."""
    free = re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"))
    amounts = [int(free[1]) * 1024] if free else []
    limit = _memory_limit()
    if limit:
        used = _read("/sys/fs/cgroup/memory.current") or _read("/sys/fs/cgroup/memory/memory.usage_in_bytes")
        # Cached files count as used, but the kernel can drop them.
        stat = _read("/sys/fs/cgroup/memory.stat") or _read("/sys/fs/cgroup/memory/memory.stat")
        files = re.search(r"^(?:inactive_file|total_inactive_file) (\d+)", stat, re.MULTILINE)
        amounts.append(limit - int(used or 0) + (int(files[1]) if files else 0))
    return max(0, min(amounts, default=0))


def _memory_limit() -> int | None:
    """The memory limit of the control group in bytes; None if there is none."""
    for path in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _read(Path("/sys/fs/cgroup") / path).strip()
        if text.isdigit() and int(text) < 1 << 60:
            return int(text)
    return None


def limits() -> Iterator[Finding]:
    """Reports how many files a process may open and, with InfiniBand, whether enough memory can be pinned."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft < _FEW_FILES
    yield Finding(NOTE if few else OK, f"open files: {soft} at most", f"ulimit -n {hard}" if few else None)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if Path("/sys/class/infiniband").is_dir() and locked != resource.RLIM_INFINITY:
        yield Finding(NOTE, f"InfiniBand, and only {locked / 2**20:.0f} MiB of memory may be pinned",
                      "ulimit -l unlimited, or docker run --ulimit memlock=-1 …")


def environment() -> Iterator[Finding]:
    """Reports variables that examples/setup.sh sets for speed but this shell lacks, and others that affect a run."""
    wanted = re.findall(r"^export (\w+)=\$\{\1:-(.+)\}$", _read(ROOT / "examples/setup.sh"), re.MULTILINE)
    for name, value in wanted:
        if name not in os.environ:
            yield Finding(NOTE, f"{name} is not set: on a CPU steps take longer (the scripts of examples/ set it)",
                          f"export {name}={value}")
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is not None and not (threads.isdigit() and int(threads) > 0):
        yield Finding(WRONG, f"OMP_NUM_THREADS is {threads!r}, where a whole number should be", "unset OMP_NUM_THREADS")
    elif threads is not None and int(threads) > len(os.sched_getaffinity(0)):
        yield Finding(NOTE, f"OMP_NUM_THREADS is {threads}, more than there are cores", "unset OMP_NUM_THREADS")
    elif threads is not None and int(threads) < len(os.sched_getaffinity(0)) and is_alone():
        yield Finding(NOTE, f"OMP_NUM_THREADS is {threads}: one process on a CPU leaves the other cores idle",
                      "unset OMP_NUM_THREADS")
    names = sorted(name for name in os.environ if _WATCHED.fullmatch(name))
    if names:
        yield Finding(OK, "set: " + ", ".join(f"{name}={os.environ[name]}" for name in names))


def _read(path: str | Path) -> str:
    """The content of a system file; "" if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
