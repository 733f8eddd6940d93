"""Writes files and folders atomically: they appear under their final name when complete and synced; locks."""

import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from errno import EACCES, EAGAIN, EDQUOT, EFBIG, ENOSPC, EWOULDBLOCK
from itertools import takewhile
from pathlib import Path
from typing import IO, Any

from megatron.errors import ConfigError

LONGEST_WAIT_S = 60.0
NO_ROOM = frozenset({ENOSPC, EDQUOT, EFBIG})  # how a full disk, a quota and a limit of files refuse to take more
_MARK, _REPLACED = ".unfinished-", "-replaced"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A context with a temporary path, which is renamed to `path` at the end, or removed if the block raises.

    Readers of `path` see either the old or the new content, and several processes may replace it at once. If `path` is
    a link, its target is replaced; a device or a pipe is written to directly. OSErrors of writing name `path`.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    temporary = path.with_name(f"{_MARK}{path.name}-{uuid.uuid4().hex}")
    try:
        with _named(path, temporary):
            yield temporary
            sync(temporary)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def missing_folders(path: Path) -> list[Path]:
    """Those of `path` and its parents that do not exist, the deepest first."""
    return list(takewhile(lambda folder: not folder.exists(), (path, *path.parents)))


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of the folders, given deepest first, that exist and are empty."""
    with suppress(OSError):
        for folder in folders:
            with suppress(FileNotFoundError):
                folder.rmdir()


@contextmanager
def leaving_no_empty(path: Path) -> Iterator[None]:
    """A context that, if the block raises, removes `path` and its parents as far as the block created them and they
    are empty.
    """
    missing = missing_folders(path)
    try:
        yield
    except BaseException:
        remove_empty(missing)
        raise


def left_over(path: Path, begins: bool = False) -> Iterator[Path]:
    """The temporary files or folders that killed processes left when writing `path`.

    `begins`: or when writing any path that begins with `path`.
    """
    ours = re.compile(re.escape(_MARK + path.name) + (".*" if begins else f"({_REPLACED}|-[0-9a-f]{{32}})?"))
    return (other for other in path.parent.glob(f"{_MARK}*") if ours.fullmatch(other.name))


def remains(folder: Path) -> Iterator[tuple[str, Path]]:
    """The temporary files of `replacing` that are in `folder`, each after the name that it was to get.

    Killed processes left them, unless one is about to finish its own.
    """
    ours = re.compile(re.escape(_MARK) + "(.+)-[0-9a-f]{32}")
    return ((found[1], path) for path in folder.glob(f"{_MARK}*") if (found := ours.fullmatch(path.name)))


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8; raises OSError."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON to `path` atomically; raises OSError."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def begin_folder(path: Path) -> Path:
    """An empty temporary folder beside `path`, to be filled before `finish_folder`.

    Removes what killed processes left; so only one process at a time may do this for a path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in left_over(path):
        shutil.rmtree(old, ignore_errors=True)
    temporary = path.parent / f"{_MARK}{path.name}"
    temporary.mkdir()
    return temporary


def finish_folder(path: Path) -> None:
    """Rename the temporary folder of `begin_folder` to `path`, replacing an existing one; its files must be synced."""
    temporary = path.parent / f"{_MARK}{path.name}"
    sync(temporary)
    if path.exists():
        replaced = path.parent / f"{_MARK}{path.name}{_REPLACED}"
        path.rename(replaced)
        temporary.rename(path)
        shutil.rmtree(replaced)
    else:
        temporary.rename(path)
    sync(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A context with a temporary folder, which is renamed to `path` at the end, or removed if the block raises.

    OSErrors of writing name `path`.
    """
    temporary = begin_folder(path)
    try:
        with _named(path, temporary):
            yield temporary
            finish_folder(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def try_lock(file: IO | int) -> bool:
    """Try to lock an open file; False if another process holds the lock, True also if the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (EACCES, EAGAIN, EWOULDBLOCK)
    return True


@contextmanager
def locked(path: Path, longest_work_s: float = 0.0) -> Iterator[None]:
    """A context that holds the lock of `path`, a file or folder, or continues without it if it cannot be had in time.

    It waits for LONGEST_WAIT_S plus `longest_work_s`, the time that another holder's work may take. So use it only for
    work that two processes may do at once without harm, apart from wasted time or lost cache entries.
    """
    deadline = time.monotonic() + LONGEST_WAIT_S + longest_work_s
    descriptor = _open_lock(path)
    try:
        while descriptor is not None and time.monotonic() < deadline and not try_lock(descriptor):
            time.sleep(0.02)
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):  # explicitly, since a forked child may keep the file open
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def check_shared_memory(num_locks: int, flag: str, without: str) -> None:
    """Raises ConfigError if /dev/shm has no room for so many locks of worker processes.

    `flag`: the one that asks for the workers, with its value; `without`: the one that does without them.
    """
    make_lock = multiprocessing.get_context("fork").Lock
    try:
        _ = [make_lock() for _ in range(num_locks)]  # at once, as each frees its room when it goes
    except OSError as error:
        raise ConfigError(f"{flag}: /dev/shm refuses the locks of the worker processes ({error.strerror}); make room "
                          f"there, or give {without}") from None


def refusal(error: OSError) -> str:
    """What the system refused, why, and what to do, if the error names a file; else its own text."""
    if error.filename is None:
        return str(error)
    if error.errno in NO_ROOM:
        return (f"{error.filename}: cannot be written ({error.strerror}); {making_room(error)}, and run the same "
                "command again")
    return f"{error.filename}: cannot be used ({error.strerror}); give another path, or make this one usable"


def making_room(error: OSError) -> str:
    """What lets the system take more of what it refused to write."""
    return "raise the limit on the size of files (ulimit -f)" if error.errno == EFBIG else "make room"


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's contents, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """fsync a file, or the directory entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _named(path: Path, temporary: Path) -> Iterator[None]:
    """A context in which OSErrors that name `temporary`, or (for a full disk) no file, name `path` instead."""
    try:
        yield
    except OSError as error:
        if error.strerror and (error.filename is None or str(error.filename).startswith(str(temporary))):
            error.filename = str(path)
        raise


def _open_lock(path: Path) -> int | None:
    """The descriptor of a lock file, created if missing; None if it cannot be opened."""
    for flags in (os.O_RDWR | os.O_CREAT, os.O_RDONLY):  # another user's file may be read-only, which suffices
        with suppress(OSError):
            return os.open(path, flags, 0o666)
    return None
