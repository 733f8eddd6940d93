"""Files that processes of one host share: they appear whole or not at all, and one process makes them for all."""

import contextlib
import fcntl
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from megatron import files
from megatron.errors import ConfigError

LONGEST_WAIT_S = 60.0
STALE_AFTER_S = 3600.0


def choose_cache_folder(prefix: str, data_cache_path: str | None) -> Path:
    """The folder for row indices: `--data-cache-path`, else beside the data, else the user's cache folder.

    Raises ConfigError if none of them can be written.
    """
    if data_cache_path is not None:
        folders = [Path(data_cache_path)]
    else:
        folders = [Path(prefix).resolve().parent / "row_index", Path.home() / ".cache" / "protein-rows"]
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
    raise ConfigError(f"{' and '.join(map(str, folders))} cannot be written, so the row index has no place; "
                      "name a folder with --data-cache-path")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """As `megatron.files.replacing`; raises ConfigError where the file cannot be written."""
    try:
        with files.replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); make room, or name another folder with "
                          "--data-cache-path") from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of file `path`; goes on without it where it is long in coming or not to be had.

    What it guards is so written that two who do it at once waste time and nothing else.
    """
    deadline = time.monotonic() + LONGEST_WAIT_S
    with open(path, "a") as file:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:  # a file system without locks
                break
        try:
            yield
        finally:  # in words, as a forked child may hold the file open for longer
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)


def remove_stale(path: Path) -> None:
    """Removes what killed processes left of their attempts to write `path`, or a file whose name begins so."""
    for unfinished in files.left_over(path):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - unfinished.stat().st_mtime > STALE_AFTER_S:
                unfinished.unlink()
