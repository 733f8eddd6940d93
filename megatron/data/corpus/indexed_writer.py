"""Writes Megatron's indexed datasets in constant memory, and such that an unfinished one is never mistaken for whole.

Everything is first written into the folder PREFIX.partial. At the end the old PREFIX.idx and .names are removed, then
the .bin and .names are moved into place, and the .idx last: if there is an .idx, its .bin and .names are complete.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike

from megatron.data.corpus.indexed import DTYPES, MMAP_MAGIC, TNT_MAGIC
from megatron.errors import DataError
from megatron.files import sync, try_lock

_CHUNK_ITEMS = 1 << 20
_SPOOLS = ("bin", "sizes", "documents", "names")
PROGRESS_FILE = "progress.json"  # in PREFIX.partial: what the user of the writer needs to resume


class IndexedWriter:
    """A context that documents are added to; on leaving it without an error, PREFIX.bin and PREFIX.idx appear.

    `impl`: "mmap" stores ids as uint16, "cached" and "lazy" as int32, unless `dtype` is given. `resume_at`: a value
    that `commit` returned, to continue after what was committed then; without it the writer starts empty.
    `with_names`: also write PREFIX.names, one document's name a line. Raises DataError if another writer is at work on
    the prefix.
    """

    def __init__(self, prefix: str | Path, impl: str = "mmap", resume_at: tuple[int, ...] | None = None,
                 with_names: bool = False, dtype: np.dtype | None = None) -> None:
        self.prefix, self.impl, self.with_names = str(prefix), impl, with_names
        self.dtype = dtype or np.dtype(np.uint16 if impl == "mmap" else np.int32)
        self.folder = Path(f"{prefix}.partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{self.folder}: cannot make this folder for the output ({error.strerror}); choose another "
                            "--output-prefix, in a folder that can be written") from None
        self._lock = _take_lock(self.folder)
        if resume_at is None:  # else an earlier run could resume from what is written now
            (self.folder / PROGRESS_FILE).unlink(missing_ok=True)
        self._spools = [open_spool(self.folder / name, length)
                        for name, length in zip(_SPOOLS, resume_at or (0,) * len(_SPOOLS), strict=True)]
        self._bin, self._sizes, self._documents, self._names = self._spools

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        if kind is not None:
            self.discard()
            return
        try:
            self.finish()
        except BaseException:
            self.discard()
            raise

    def add(self, ids: ArrayLike = (), sizes: ArrayLike = (), num_sequences: ArrayLike = (),
            names: bytes = b"") -> None:
        """Append documents: all their `ids`, the `sizes` of their sequences, `num_sequences` of each, lines of `names`.
        """
        self._bin.write(np.ascontiguousarray(ids, dtype=self.dtype).data)
        self._sizes.write(np.ascontiguousarray(sizes, dtype=np.int32).data)
        self._documents.write(np.ascontiguousarray(num_sequences, dtype=np.int32).data)
        self._names.write(names)

    def commit(self) -> tuple[int, ...]:
        """Sync everything added so far to the disk; returns the value to pass as `resume_at` to continue from here."""
        for spool in self._spools:
            spool.flush()
            os.fsync(spool.fileno())
        return tuple(spool.tell() for spool in self._spools)

    def finish(self) -> None:
        """Write the index and move all files into place."""
        self.commit()
        with open(self.folder / "idx", "wb") as file:
            for part in self._index():
                file.write(np.ascontiguousarray(part).data)
            file.flush()
            os.fsync(file.fileno())
        for ending in ("idx", "names"):
            Path(f"{self.prefix}.{ending}").unlink(missing_ok=True)
        sync(self.folder.parent)
        os.replace(self.folder / "bin", f"{self.prefix}.bin")
        if self.with_names:
            os.replace(self.folder / "names", f"{self.prefix}.names")
        sync(self.folder.parent)
        os.replace(self.folder / "idx", f"{self.prefix}.idx")
        sync(self.folder.parent)
        self.discard()

    def discard(self) -> None:
        """Remove PREFIX.partial with everything that is not in place yet."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Close the files, and keep PREFIX.partial for a later writer that resumes."""
        for file in (*self._spools, self._lock):
            with suppress(OSError):  # a full disk: what matters was written by `commit`
                file.close()

    def _index(self) -> Iterator[np.ndarray]:
        """The content of the .idx, in parts."""
        num_sequences, num_documents = self._sizes.tell() // 4, self._documents.tell() // 4
        sizes, documents = self.folder / "sizes", self.folder / "documents"
        zero = np.zeros(1, dtype=np.int64)
        code = next(code for code, kind in DTYPES.items() if kind == self.dtype.type)
        if self.impl == "mmap":
            yield np.frombuffer(MMAP_MAGIC + (1).to_bytes(8, "little") + bytes([code]), dtype=np.uint8)
            yield np.array([num_sequences, num_documents + 1], dtype=np.int64)
            yield from _chunks(sizes)
            yield from (ends - chunk for chunk, ends in _running_sums(sizes, self.dtype.itemsize))
        else:
            yield np.frombuffer(TNT_MAGIC, dtype=np.uint8)
            yield np.array([1, code, self.dtype.itemsize, num_sequences, num_sequences, num_documents + 1], np.int64)
            yield from (np.arange(start, min(start + _CHUNK_ITEMS, num_sequences + 1), dtype=np.int64)
                        for start in range(0, num_sequences + 1, _CHUNK_ITEMS))
            yield zero
            yield from (ends for _, ends in _running_sums(sizes, 1))
            yield from (chunk.astype(np.int64) for chunk in _chunks(sizes))
        yield zero
        yield from (ends for _, ends in _running_sums(documents, 1))


def open_spool(path: Path, length: int) -> BinaryIO:
    """A file of PREFIX.partial, cut to the `length` bytes that were committed, and open for appending.

    Raises DataError if it has fewer.
    """
    file = open(path, "r+b" if length else "w+b")  # noqa: SIM115 (held as long as the writer)
    if os.fstat(file.fileno()).st_size < length:
        file.close()
        raise DataError(f"{path}: has lost what an earlier run had written; remove {path.parent} and run again")
    file.truncate(length)
    file.seek(length)
    return file


def _take_lock(folder: Path) -> BinaryIO:
    """The lock file of PREFIX.partial, locked while it is open; raises DataError if another program holds it."""
    file = open(folder / "lock", "wb")  # noqa: SIM115 (held as long as the writer)
    if not try_lock(file):
        file.close()
        raise DataError(f"{folder}: another program is writing this output; wait for it or choose another "
                        "--output-prefix")
    return file


def _chunks(path: Path) -> Iterator[np.ndarray]:
    """The int32 numbers in a file, in chunks."""
    with open(path, "rb") as file:
        while len(chunk := np.fromfile(file, dtype=np.int32, count=_CHUNK_ITEMS)):
            yield chunk


def _running_sums(path: Path, scale: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The numbers in a file times `scale`, in chunks, each with its cumulative sums over the whole file; int64."""
    total = 0
    for chunk in _chunks(path):
        scaled = chunk.astype(np.int64) * scale
        ends = np.cumsum(scaled) + total
        total = int(ends[-1])
        yield scaled, ends
