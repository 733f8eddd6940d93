"""One run, one folder: whoever saves into a folder holds its lock, and a run that died does not hold it for ever.

FOLDER/.lock says who: host, process and when it started. Whether a process of this host lives can be asked. That of
another host, with which we share a file system, shows by the time of change of its lock, which it renews every BEAT_S;
where that rests for STALE_S, the process is dead. (Network file systems may ignore flock.)
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.errors import CheckpointError, ConfigError
from megatron.files import missing_folders, remove_empty
from megatron.log import Log

if TYPE_CHECKING:
    from megatron.parallel.mesh import Mesh

LOCK = ".lock"
BEAT_S = 15.0
STALE_S = 180.0  # many beats: writing a large checkpoint may hold up the thread that beats
SETTLE_S = 0.2  # another process that has found the same dead holder has put its name over ours by then


@contextmanager
def claimed(folder: str | None, mesh: "Mesh", log: Log) -> Iterator["Claim | None"]:
    """Rank 0's claim to `folder`, None elsewhere or without a folder; all ranks call this, and go on together.

    Raises ConfigError, on rank 0, where another run holds the folder or where it cannot be written.
    """
    if folder is None:
        yield None
        return
    import torch  # here, since who only looks at a folder needs none of it, and it takes seconds

    from megatron.parallel.collectives import all_reduce_sum

    claim = Claim(Path(folder)) if mesh.world.rank == 0 else None
    try:
        if claim is not None:
            claim.acquire(log.line)
        all_reduce_sum(torch.zeros(1, device=mesh.device), mesh.world)  # nobody goes on before it is ours
        yield claim
    finally:
        if claim is not None:
            claim.release()


def is_held(folder: Path) -> bool | None:
    """Whether a process that lives holds the folder; False where its holder has died, None where there is no lock.

    Of a process on another host the lock's age tells, by this host's clock.
    """
    found = _read(folder / LOCK)
    if found is None:
        return None
    lives = _lives_here(found[0])
    return time.time() - found[1] < STALE_S if lives is None else lives


class Claim:
    """The right of this process to write into a folder, from `acquire` to `release`."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, folder / LOCK
        pid = os.getpid()
        self._me = {"host": socket.gethostname(), "pid": pid, "machine": _machine(), "started": _start_of(pid),
                    "token": uuid.uuid4().hex}
        self._is_released, self._new = threading.Event(), missing_folders(folder)

    def acquire(self, tell: Callable[[str], None]) -> None:
        """Take the lock, a dead holder's as well, and keep it fresh; `tell` hears of a wait for a sign of life."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            while not self._create():
                found = _read(self._lock)
                if found is not None and self._is_dead(*found, tell):
                    self._take_over()
        except OSError as error:
            why = "it is a file" if isinstance(error, FileExistsError) else error.strerror
            raise ConfigError(f"--save {self._folder} cannot be written ({why}); name a folder that can") from error
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def check(self) -> None:
        """Raises CheckpointError where another run holds the folder: to it, this one seemed dead.

        A disk that does not answer says nothing of another run.
        """
        try:
            is_ours = self._is_ours() or self._create()
        except OSError:
            return
        if not is_ours:
            raise CheckpointError(f"{self._folder} was taken over by another run while this one did not answer; "
                                  "nothing of it was overwritten. Go on with one of the two")

    def release(self) -> None:
        """Give the folder free; it and those that it is in go again where we made them and nothing has come in."""
        self._is_released.set()
        with suppress(OSError):
            if self._is_ours():
                self._lock.unlink()
                remove_empty(self._new)

    def _create(self) -> bool:
        """Whether there was no lock, and now is ours, or it is already."""
        try:
            file = self._lock.open("x", encoding="utf-8")
        except FileExistsError:
            return self._is_ours()
        try:
            with file:
                json.dump(self._me, file)
        except OSError:  # on a full disk, whose next start would wait for the holder of an empty lock
            self._lock.unlink()
            raise
        return True

    def _is_ours(self) -> bool:
        found = _read(self._lock)
        return found is not None and found[0].get("token") == self._me["token"]

    def _take_over(self) -> None:
        """Put our name over a dead holder's; the last to do so has the lock."""
        ours = self._lock.with_name(f"{LOCK}-{self._me['token']}")
        ours.write_text(json.dumps(self._me), encoding="utf-8")
        ours.replace(self._lock)
        time.sleep(SETTLE_S)

    def _is_dead(self, holder: dict[str, Any], beat_s: float, tell: Callable[[str], None]) -> bool:
        """Whether the holder of the lock has ended, or ends while we wait; raises ConfigError where it lives."""
        who = f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown host')}"
        in_use = ConfigError(f"--save {self._folder} is in use by {who}; wait for its end, stop it, or name another "
                             "folder")
        lives = _lives_here(holder)
        if lives:
            raise in_use
        if lives is False:
            return True
        left_s = min(STALE_S, STALE_S - (self._time_there_s() - beat_s))  # a clock may have been put back since
        if left_s > 0:
            tell(f"{self._folder} was in use by {who}: waiting up to {left_s:.0f} s for a sign of life")
        deadline_s = time.monotonic() + left_s
        while time.monotonic() < deadline_s:
            time.sleep(min(1.0, BEAT_S))
            now = _read(self._lock)
            if now is None:
                return False
            if now != (holder, beat_s):
                raise in_use
        return True

    def _time_there_s(self) -> float:
        """The time by the clock of the file system, which need not be ours."""
        probe = self._lock.with_name(f"{LOCK}-{self._me['token']}")
        probe.touch()
        now_s = probe.stat().st_mtime
        probe.unlink()
        return now_s

    def _beat(self) -> None:
        while not self._is_released.wait(BEAT_S):
            with suppress(OSError):
                if self._is_ours():
                    os.utime(self._lock)


def _read(lock: Path) -> tuple[dict[str, Any], float] | None:
    """Who holds the lock, as far as it can be read, and the time of the last sign of life; None without a lock."""
    try:
        with lock.open("rb") as file:  # opening, unlike a look at its name, makes a network file system ask its server
            beat_s, text = os.fstat(file.fileno()).st_mtime, file.read()
    except FileNotFoundError:
        return None
    try:
        holder = json.loads(text)
    except ValueError:
        holder = None
    return (holder if isinstance(holder, dict) else {}), beat_s


def _lives_here(holder: dict[str, Any]) -> bool | None:
    """Whether a holder of this machine lives; None for one of another."""
    if holder.get("machine") != _machine():
        return None
    pid = holder.get("pid")
    started = _start_of(pid) if isinstance(pid, int) else None
    return started is not None and started == holder.get("started")


def _machine() -> str:
    """What only processes have in common whose numbers mean the same: this start of this host, or container."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()  # not Linux


def _start_of(pid: int) -> str | None:
    """When a process of this machine started, in its own unit; None where it has ended."""
    if Path("/proc/self/stat").exists():
        try:
            state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if state in "ZX" else fields[18]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"
