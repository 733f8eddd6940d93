"""Files and folders that appear under their final name only when they are whole and on the disk; locks of files."""

import fcntl
import hashlib
import json
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

LONGEST_WAIT_S = 60.0
NO_ROOM = frozenset({ENOSPC, EDQUOT, EFBIG})  # how a full disk, a quota and a limit of files refuse to take more
_MARK, _REPLACED = ".unfinished-", "-replaced"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name when the block ends well, and vanishes when it does not.

    Whoever reads `path` sees the old content or the new, never a part; several may replace it at once. Of a link it is
    what that leads to. A device or a pipe is written to itself. An OSError of the writing names `path`.
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
    """Of `path` and the folders that it is in those that are not there, the deepest first."""
    return list(takewhile(lambda folder: not folder.exists(), (path, *path.parents)))


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those folders, the deepest first, that are there and empty."""
    with suppress(OSError):
        for folder in folders:
            with suppress(FileNotFoundError):
                folder.rmdir()


@contextmanager
def leaving_no_empty(path: Path) -> Iterator[None]:
    """Where the block fails, folders that it has made, `path` and those that it is in, go again if they are empty."""
    missing = missing_folders(path)
    try:
        yield
    except BaseException:
        remove_empty(missing)
        raise


def left_over(path: Path, begins: bool = False) -> Iterator[Path]:
    """What killed processes have left of their attempts to replace `path`, a file or a folder.

    `begins`: or whatever has a name that begins so.
    """
    ours = re.compile(re.escape(_MARK + path.name) + (".*" if begins else f"({_REPLACED}|-[0-9a-f]{{32}})?"))
    return (other for other in path.parent.glob(f"{_MARK}*") if ours.fullmatch(other.name))


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON to `path`, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def begin_folder(path: Path) -> Path:
    """An empty temporary folder beside `path`, for `finish_folder`; what killed processes left of theirs goes.

    One process at a time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in left_over(path):
        shutil.rmtree(old, ignore_errors=True)
    temporary = path.parent / f"{_MARK}{path.name}"
    temporary.mkdir()
    return temporary


def finish_folder(path: Path) -> None:
    """Give what `begin_folder` made for `path` its name, once all its files are on the disk; replaces what is there."""
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
    """A temporary folder that becomes `path` when the block ends well, and vanishes when it does not.

    An OSError of the writing names `path`.
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
    """Take the lock of an open file; False where another has it, True too where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (EACCES, EAGAIN, EWOULDBLOCK)
    return True


@contextmanager
def locked(path: Path, longest_work_s: float = 0.0) -> Iterator[None]:
    """Holds the lock of `path`, a file or folder; goes on without it where it is long in coming or not to be had.

    `longest_work_s`: what its holder may need besides.

    What it guards is so written that two who do it at once waste time, or lose what can be had again, and nothing else.
    """
    deadline = time.monotonic() + LONGEST_WAIT_S + longest_work_s
    descriptor = _open_lock(path)
    try:
        while descriptor is not None and time.monotonic() < deadline and not try_lock(descriptor):
            time.sleep(0.02)
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):  # in words, as a forked child may hold the file open for longer
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's contents, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _named(path: Path, temporary: Path) -> Iterator[None]:
    """Raises the block's OSErrors as those of `path`, where they name `temporary` or, as of a full disk, nothing."""
    try:
        yield
    except OSError as error:
        if error.strerror and (error.filename is None or str(error.filename).startswith(str(temporary))):
            error.filename = str(path)
        raise


def _open_lock(path: Path) -> int | None:
    for flags in (os.O_RDWR | os.O_CREAT, os.O_RDONLY):  # another user's can often be read, which is enough to lock it
        with suppress(OSError):
            return os.open(path, flags, 0o666)
    return None
