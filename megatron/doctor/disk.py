"""Checks the disk where a run would save: whether it is writable, its free space and its speed."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from megatron.doctor.finding import NOTE, OK, WRONG, Finding

CHUNK, MOST_CHUNKS, LONGEST_S = 1 << 24, 8, 3.0
_LEAST_FREE, _SLOW_MB_PER_S = 1 << 30, 50


def disk(save: Path) -> Iterator[Finding]:
    """Reports the free space, and the speed of writing, syncing and reading a file of up to 128 MiB; `save`: --save."""
    folder = next(folder for folder in (save.absolute(), *save.absolute().parents) if folder.exists())
    if not folder.is_dir():
        yield Finding(WRONG, f"--save {save}: {folder} is a file", "give another --save")
        return
    free = shutil.disk_usage(folder).free
    if free < _LEAST_FREE:
        yield Finding(WRONG, f"{folder}: {free / 1e9:.2f} GB are free", f"du -xh -d 1 {folder} | sort -h")
    try:
        written, read = rates(folder)
    except OSError as error:
        yield Finding(WRONG, f"{folder}: cannot be written to ({error.strerror or error})",
                      "give another --save, or make room")
        return
    level = NOTE if min(written, read) < _SLOW_MB_PER_S else OK
    yield Finding(level, f"{folder}: {free / 1e9:.0f} GB free, written at {written:.0f} MB/s, read at {read:.0f} MB/s",
                  "give --save on a local disk" if level == NOTE else None)


def rates(folder: Path) -> tuple[float, float]:
    """The speeds of writing (with fsync) and of reading, in MB/s.

    If the page cache cannot be dropped, the second is the speed of reading from memory. Raises OSError.
    """
    data, num_chunks = os.urandom(CHUNK), 0
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        began_s = time.perf_counter()
        while num_chunks < MOST_CHUNKS and time.perf_counter() - began_s < LONGEST_S:
            file.write(data)
            num_chunks += 1
        os.fsync(file.fileno())
        written_s = time.perf_counter() - began_s
        with contextlib.suppress(OSError):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began_s, num_bytes = time.perf_counter(), 0
        while (chunk := file.read(CHUNK)) and time.perf_counter() - began_s < LONGEST_S:
            num_bytes += len(chunk)
        read_s = time.perf_counter() - began_s
    return num_chunks * CHUNK / 1e6 / max(written_s, 1e-9), num_bytes / 1e6 / max(read_s, 1e-9)
