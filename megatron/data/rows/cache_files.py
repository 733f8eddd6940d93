"""Files that processes and users share, and that save time alone: one process makes them for all, if it can.

They appear whole or not at all. Where one cannot be locked, read or written (the disk is full, it is another user's),
each process goes on without it.
"""

import contextlib
import fcntl
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from megatron import files
from megatron.errors import ConfigError

LONGEST_WAIT_S = 60.0
STALE_AFTER_S = 3600.0


def choose_cache_folder(prefix: str, data_cache_path: str | None) -> Path:
    """The folder for row indices: `--data-cache-path`, else beside the data, else the user's cache folder.

    Raises ConfigError if none of them can be written.
    """
    tried = []
    for folder in _candidates(prefix, data_cache_path):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        tried.append(str(folder))
    raise ConfigError(f"{' and '.join(tried)} cannot be written, so the row index has no place; name a folder with "
                      "--data-cache-path")


def _candidates(prefix: str, data_cache_path: str | None) -> Iterator[Path]:
    if data_cache_path is not None:
        yield Path(data_cache_path)
        return
    yield Path(prefix).resolve().parent / "row_index"
    with contextlib.suppress(RuntimeError):  # neither HOME nor an entry in /etc/passwd
        yield Path.home() / ".cache" / "protein-rows"


@contextlib.contextmanager
def keeping(path: Path) -> Iterator[BinaryIO]:
    """The file to write that becomes `path`; where it cannot be written, a note says so and nothing is left."""
    has_begun = False
    try:
        with files.replacing(path) as temporary, open(temporary, "xb") as file:
            has_begun = True
            yield file
    except OSError as error:
        if not has_begun:
            yield BytesIO()
        print(f"note: {path}: cannot be written ({error.strerror}), so each process works it out anew; make room, or "
              "name another folder with --data-cache-path", file=sys.stderr)


@contextlib.contextmanager
def locked(path: Path, longest_work_s: float = 0.0) -> Iterator[None]:
    """Holds the lock of file `path`; goes on without it where it is long in coming or not to be had.

    `longest_work_s`: what its holder may need besides.

    What it guards is so written that two who do it at once waste time and nothing else.
    """
    deadline = time.monotonic() + LONGEST_WAIT_S + longest_work_s
    descriptor = _open_lock(path)
    try:
        while descriptor is not None and time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):  # in words, as a forked child may hold the file open for longer
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _open_lock(path: Path) -> int | None:
    for flags in (os.O_RDWR | os.O_CREAT, os.O_RDONLY):  # another user's can often be read, which is enough to lock it
        with contextlib.suppress(OSError):
            return os.open(path, flags, 0o666)
    return None


def remove_stale(path: Path) -> None:
    """Removes what killed processes left of their attempts to write `path`, or a file whose name begins so."""
    for unfinished in files.left_over(path, begins=True):
        with contextlib.suppress(OSError):
            if time.time() - unfinished.stat().st_mtime > STALE_AFTER_S:
                unfinished.unlink()
