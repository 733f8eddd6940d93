"""Row indices on disk: built once by the process that first needs one, and mapped by all others on the host.

A file's name contains a digest of everything that its contents depend on. There is no designated builder: a process
that finds no file takes the lock and builds it; if the lock is not released in time, it builds the index without it.
"""

import contextlib
import glob
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron.data.corpus.mapping import mapped
from megatron.data.rows.cache_files import keeping, remove_stale
from megatron.data.rows.packing import PackedRows
from megatron.files import locked

FORMAT = int.from_bytes(b"ROWS0001", "little")
COUNTS_FORMAT = int.from_bytes(b"ROWCNT01", "little")
PACKING_S = 1e-6  # seconds of packing for a piece, an upper estimate (a billion took 88 s), to limit waiting for others
SECONDS_AT_RISK = 2.0  # how much counting is lost at most if the process is killed

Pack = Callable[[int], PackedRows]


class RowCache:
    """The row indices of one dataset, a file for each epoch: FOLDER/STEM-EPOCH.rows; the two newest epochs are kept.

    STEM.counts stores the number of rows of every epoch, so that resuming need not pack past epochs. `num_pieces`: of
    the dataset, which determines how long to wait for another process that is packing. The argument `pack` of the
    methods computes the rows of an epoch that has no file.
    """

    def __init__(self, folder: Path, stem: str, num_pieces: int = 0) -> None:
        self.folder, self.stem, self._longest_work_s = folder, stem, PACKING_S * num_pieces

    def rows(self, epoch: int, pack: Pack) -> PackedRows:
        """The rows of an epoch, mapped from their file, or in memory if it cannot be written."""
        rows = self._map(epoch)
        if rows is not None:
            return rows
        with locked(self.folder / f"{self.stem}.lock", self._longest_work_s):
            rows = self._map(epoch, tell=True)
            return self._keep(epoch, pack(epoch)) if rows is None else rows

    def known_first_samples(self) -> list[int]:
        """The first samples of epochs 0, 1, …, as far as any process has counted them."""
        with contextlib.suppress(OSError, ValueError):  # missing, another user's, or damaged
            head, known = np.split(np.fromfile(self.folder / f"{self.stem}.counts", dtype=np.int64), [2])
            if head.tolist() == [COUNTS_FORMAT, zlib.crc32(known.data)]:
                return known.tolist()
        return [0]

    def count(self, first_samples: list[int], sample: int, pack: Pack) -> None:
        """Extend `first_samples`, those of epochs 0, 1, …, until the last one is past `sample`."""
        first_samples += self.known_first_samples()[len(first_samples):]
        if first_samples[-1] > sample:
            return
        with locked(self.folder / f"{self.stem}.lock", self._longest_work_s):
            first_samples += self.known_first_samples()[len(first_samples):]
            kept_at_s = time.monotonic()
            while first_samples[-1] <= sample:
                epoch = len(first_samples) - 1
                rows = self._map(epoch, tell=True)
                is_packed = rows is None
                rows = pack(epoch) if rows is None else rows
                first_samples.append(first_samples[-1] + len(rows))
                is_last = first_samples[-1] > sample
                if is_last and is_packed:  # its rows will be read; of earlier epochs only the size is needed
                    self._keep(epoch, rows)
                if is_last or time.monotonic() - kept_at_s > SECONDS_AT_RISK:
                    self._keep_counts(first_samples)
                    kept_at_s = time.monotonic()

    def _keep_counts(self, first_samples: list[int]) -> None:
        """Write STEM.counts."""
        array = np.array(first_samples, dtype=np.int64)
        with keeping(self.folder / f"{self.stem}.counts") as file:
            file.write(np.array([COUNTS_FORMAT, zlib.crc32(array.data)], dtype=np.int64).data)
            file.write(array.data)

    def _path(self, epoch: int) -> Path:
        return self.folder / f"{self.stem}-{epoch:06d}.rows"

    def _map(self, epoch: int, tell: bool = False) -> PackedRows | None:
        """The rows in the file of an epoch; None if it is missing or damaged; `tell`: say so if it is damaged."""
        try:
            raw = mapped(self._path(epoch))
        except OSError:  # missing, or another user's
            return None
        head = np.frombuffer(raw, np.int64, 4) if len(raw) >= 32 else np.zeros(4, np.int64)
        file_format, num_rows, num_pieces, item_bytes = head.tolist()
        if file_format != FORMAT or len(raw) != 8 * (5 + num_rows) + item_bytes * num_pieces:
            if tell:
                print(f"note: {self._path(epoch)} is damaged, so its rows are packed again", file=sys.stderr)
            return None
        row_starts = np.frombuffer(raw, np.int64, num_rows + 1, 32)
        dtype = np.uint32 if item_bytes == 4 else np.int64
        return PackedRows(np.frombuffer(raw, dtype, num_pieces, 32 + row_starts.nbytes), row_starts)

    def _keep(self, epoch: int, rows: PackedRows) -> PackedRows:
        """Write the rows of an epoch; returns them mapped, so that processes share the memory, or `rows` on failure."""
        header = np.array([FORMAT, len(rows), len(rows.pieces), rows.pieces.itemsize], dtype=np.int64)
        with keeping(self._path(epoch)) as file:
            for array in (header, rows.row_starts, rows.pieces):
                file.write(np.ascontiguousarray(array).data)
        self._remove_old(epoch)
        kept = self._map(epoch)
        return rows if kept is None else kept

    def _remove_old(self, epoch: int) -> None:
        """Remove the files of epochs before the previous one."""
        for path in self.folder.glob(f"{glob.escape(self.stem)}-*.rows") if epoch else ():
            if path < self._path(epoch - 1):
                with contextlib.suppress(OSError):  # another user's, or removed by another process
                    path.unlink()
        remove_stale(self.folder / self.stem)
