"""The lock of a run's folder: one process at a time may save there, and the lock of a dead process can be taken over.

FOLDER/.lock is JSON that names the holder: host, process id and start time. A holder on this host is looked up in the
process table. A holder on another host, which shares the file system, updates the lock's modification time every BEAT_S
seconds; if that time stands still for STALE_S seconds, the holder counts as dead. (flock would be simpler, but network
file systems may ignore it.)
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
STALE_S = 180.0  # many beats, since writing a large checkpoint may delay the thread that updates the lock
SETTLE_S = 0.2  # by then, any other process that found the same dead holder has overwritten our lock file


@contextmanager
def claimed(folder: str | None, mesh: "Mesh", log: Log) -> Iterator["Claim | None"]:
    """A context in which rank 0 holds the lock of `folder`; yields its Claim, and None on other ranks or for no folder.

    Rank 0 removes what killed holders left there. All ranks call this together, and none continues before rank 0 has
    the lock. Raises ConfigError on rank 0 if another run holds the folder or it cannot be written.
    """
    if folder is None:
        yield None
        return
    import torch  # imported here: it takes seconds, and callers that only look at a folder do not need it

    from megatron.checkpoint.store import remove_left_over
    from megatron.parallel.collectives import all_reduce_sum

    claim = Claim(Path(folder)) if mesh.world.rank == 0 else None
    try:
        if claim is not None:
            claim.acquire(log.line)
            remove_left_over(Path(folder))
        all_reduce_sum(torch.zeros(1, device=mesh.device), mesh.world)  # a barrier
        yield claim
    finally:
        if claim is not None:
            claim.release()


def is_held(folder: Path) -> bool | None:
    """Whether a live process holds the folder; False if the holder has died, None if there is no lock.

    A holder on another host is judged by the lock's age, measured with this host's clock.
    """
    found = _read(folder / LOCK)
    if found is None:
        return None
    lives = _lives_here(found[0])
    return time.time() - found[1] < STALE_S if lives is None else lives


class Claim:
    """This process's exclusive right to write into a folder, from `acquire` to `release`."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, folder / LOCK
        pid = os.getpid()
        self._me = {"host": socket.gethostname(), "pid": pid, "machine": _machine(), "started": _start_of(pid),
                    "token": uuid.uuid4().hex}
        self._is_released, self._new = threading.Event(), missing_folders(folder)

    def acquire(self, tell: Callable[[str], None]) -> None:
        """Take the lock, also from a dead holder, and renew it from a thread until `release`.

        If the holder is on another host, this may wait for it to show a sign of life, up to STALE_S seconds; `tell` is
        called with a line that says so. Raises ConfigError if the holder is alive or the folder cannot be written.
        """
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
        """Raises CheckpointError if another run has taken the folder over because this one seemed dead to it.

        A lock that cannot be read because of an OSError is no sign of another run, and passes.
        """
        try:
            is_ours = self._is_ours() or self._create()
        except OSError:
            return
        if not is_ours:
            raise CheckpointError(f"{self._folder} was taken over by another run while this one did not answer; "
                                  "nothing of it was overwritten. Go on with one of the two")

    def release(self) -> None:
        """Release the lock; remove the folder, and its parents, if `acquire` created them and they are still empty."""
        self._is_released.set()
        with suppress(OSError):
            if self._is_ours():
                self._lock.unlink()
                remove_empty(self._new)

    def _create(self) -> bool:
        """Create the lock file if there is none; returns whether the lock is ours now."""
        try:
            file = self._lock.open("x", encoding="utf-8")
        except FileExistsError:
            return self._is_ours()
        try:
            with file:
                json.dump(self._me, file)
        except OSError:  # a full disk: an empty lock file would make the next start wait for an unknown holder
            self._lock.unlink()
            raise
        return True

    def _is_ours(self) -> bool:
        found = _read(self._lock)
        return found is not None and found[0].get("token") == self._me["token"]

    def _take_over(self) -> None:
        """Overwrite a dead holder's lock file with ours; if several processes do so, the last one has the lock."""
        ours = self._lock.with_name(f"{LOCK}-{self._me['token']}")
        ours.write_text(json.dumps(self._me), encoding="utf-8")
        ours.replace(self._lock)
        time.sleep(SETTLE_S)

    def _is_dead(self, holder: dict[str, Any], beat_s: float, tell: Callable[[str], None]) -> bool:
        """Whether the holder is dead, after waiting for a sign of life if it is on another host.

        `beat_s`: the lock's modification time. False if the lock disappeared meanwhile. Raises ConfigError if the
        holder is alive.
        """
        who = f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown host')}"
        in_use = ConfigError(f"--save {self._folder} is in use by {who}; wait for its end, stop it, or name another "
                             "folder")
        lives = _lives_here(holder)
        if lives:
            raise in_use
        if lives is False:
            return True
        left_s = min(STALE_S, STALE_S - (self._time_there_s() - beat_s))  # the clock may have been set back since
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
        """The current time by the file system's clock, in seconds since 1970; it may differ from this host's."""
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
    """The lock's holder ({} if it cannot be parsed) and its modification time in seconds; None if there is no lock."""
    try:
        with lock.open("rb") as file:  # opening, unlike stat, makes a network file system ask its server
            beat_s, text = os.fstat(file.fileno()).st_mtime, file.read()
    except FileNotFoundError:
        return None
    try:
        holder = json.loads(text)
    except ValueError:
        holder = None
    return (holder if isinstance(holder, dict) else {}), beat_s


def _lives_here(holder: dict[str, Any]) -> bool | None:
    """Whether the holder is alive, if it runs on this machine; None if it runs on another."""
    if holder.get("machine") != _machine():
        return None
    pid = holder.get("pid")
    started = _start_of(pid) if isinstance(pid, int) else None
    return started is not None and started == holder.get("started")


def _machine() -> str:
    """An identifier of this boot of this host or container: processes that share it have comparable process ids."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()  # not Linux


def _start_of(pid: int) -> str | None:
    """The start time of a process on this machine, in clock ticks since boot; None if it has ended.

    "unknown" for a live process where there is no /proc.
    """
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
