"""Cache files shared by processes and users: where they go, and how they are written and cleaned up.

They appear atomically. They only save time: if one cannot be locked, read or written, because the disk is full or it
belongs to another user, each process continues without it.
"""

import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from megatron import files
from megatron.errors import ConfigError

STALE_AFTER_S = 3600.0


def choose_cache_folder(prefix: str, data_cache_path: str | None) -> Path:
    """The folder for row indices: `--data-cache-path` if given, else beside the data, else the user's cache folder.

    Raises ConfigError if it cannot be written.
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
    with contextlib.suppress(RuntimeError):  # the user has neither HOME nor an entry in /etc/passwd
        yield Path.home() / ".cache" / "protein-rows"


@contextlib.contextmanager
def keeping(path: Path) -> Iterator[BinaryIO]:
    """A context with an open file that becomes `path` at the end; if it cannot be written, a note on stderr says so."""
    has_begun = False
    try:
        with files.replacing(path) as temporary, open(temporary, "xb") as file:
            has_begun = True
            yield file
    except OSError as error:
        if not has_begun:
            yield BytesIO()
        print(f"note: {path}: cannot be written ({error.strerror}), so each process works it out anew; "
              f"{files.making_room(error)}, or name another folder with --data-cache-path", file=sys.stderr)


def remove_stale(path: Path) -> None:
    """Remove what killed processes left of files whose path begins with `path`, if older than STALE_AFTER_S."""
    for unfinished in files.left_over(path, begins=True):
        with contextlib.suppress(OSError):
            if time.time() - unfinished.stat().st_mtime > STALE_AFTER_S:
                unfinished.unlink()
