"""Why the kernel kills a process: what a signal says of the cause, and what to do."""

import signal
from contextlib import suppress
from pathlib import Path

CUT_SHORT = ("a file was cut short while it was read (data copied over in place, say), its file system failed, or "
             "/dev/shm is full")
_MORE_MEMORY = "lower --micro-batch-size or --num-workers, or ask for more memory (sbatch --mem)"
_CAUSES: dict[int, str] = {
    signal.SIGBUS: f"probably because {CUT_SHORT}",
    signal.SIGILL: "probably because a library was built for another processor",
    signal.SIGXCPU: "because the limit of processor time (ulimit -t) was reached",
}


def killed_by(number: int, num_oom_kills: int = 0) -> str:
    """Words that name a signal, the likely reason for which the kernel sends it, if it tells of one, and the remedy.

    `num_oom_kills`: how many processes the kernel has killed here for want of memory while that one ran.
    """
    name = signal.Signals(number).name if number in set(signal.Signals) else "?"
    why = _CAUSES.get(number, "")
    if number == signal.SIGKILL:
        why = f"{'by the kernel' if num_oom_kills > 0 else 'probably'} for want of memory: {_MORE_MEMORY}"
    return f"killed by signal {number} ({name}){why and f', {why}'}"


def count_oom_kills(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """How many processes of this one's cgroup the kernel has killed so far for want of memory; 0 where it is not told.

    In memory.events of cgroup v2, memory.oom_control of v1. In a container both may lie at the mount's root.
    """
    files: list[Path] = []
    with suppress(OSError, ValueError):
        for line in proc.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:
                files += [folder / "memory.events" for folder in (root / group.lstrip("/"), root)]
            elif "memory" in controllers.split(","):
                of_memory = root / "memory"
                files += [folder / "memory.oom_control" for folder in (of_memory / group.lstrip("/"), of_memory)]
    for file in files:
        with suppress(OSError):
            for line in file.read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0
