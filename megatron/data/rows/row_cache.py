"""Row indices on disk: built once by whichever process needs one first, mapped by all others of the host.

A file's name carries all that its contents depend on. Nobody waits for a named rank: a process that finds no file takes
the lock and builds it, or builds it regardless if the lock is long in coming.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron.data.rows.cache_files import locked, remove_stale, replacing
from megatron.data.rows.packing import PackedRows

FORMAT = int.from_bytes(b"ROWS0001", "little")


class RowCache:
    """The row indices of one dataset, one file an epoch: FOLDER/STEM-EPOCH.rows; the two newest epochs are kept."""

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder, self.stem = folder, stem

    def rows(self, epoch: int, build: Callable[[], PackedRows]) -> PackedRows:
        """The rows of an epoch, mapped from their file; `build` makes them where there is none."""
        rows = self._map(epoch)
        if rows is not None:
            return rows
        with locked(self.folder / f"{self.stem}.lock"):
            rows = self._map(epoch)
            if rows is None:
                rows = build()
                self._write(epoch, rows)
                self._remove_old(epoch)
        return self._map(epoch) or rows

    def num_rows(self, epoch: int, build: Callable[[], PackedRows]) -> int:
        """How many rows an epoch has; remembered for every epoch, so that resuming builds no index of the past."""
        counts = self._counts()
        if str(epoch) not in counts:
            num_rows = len(self.rows(epoch, build))
            counts = {**self._counts(), str(epoch): num_rows}
            with replacing(self.folder / f"{self.stem}.counts") as path:
                path.write_text(json.dumps(counts))
        return counts[str(epoch)]

    def _path(self, epoch: int) -> Path:
        return self.folder / f"{self.stem}-{epoch:06d}.rows"

    def _counts(self) -> dict[str, int]:
        try:
            return json.loads((self.folder / f"{self.stem}.counts").read_text())
        except (FileNotFoundError, ValueError):  # none yet, or damaged
            return {}

    def _map(self, epoch: int) -> PackedRows | None:
        try:
            raw = np.memmap(self._path(epoch), dtype=np.uint8, mode="r").view(np.ndarray)
            file_format, num_rows, num_pieces, item_bytes = np.frombuffer(raw, np.int64, 4).tolist()
        except (FileNotFoundError, ValueError):  # none yet, or damaged
            return None
        if file_format != FORMAT or len(raw) != 8 * (5 + num_rows) + item_bytes * num_pieces:
            return None
        row_starts = np.frombuffer(raw, np.int64, num_rows + 1, 32)
        dtype = np.uint32 if item_bytes == 4 else np.int64
        return PackedRows(np.frombuffer(raw, dtype, num_pieces, 32 + row_starts.nbytes), row_starts)

    def _write(self, epoch: int, rows: PackedRows) -> None:
        header = np.array([FORMAT, len(rows), len(rows.pieces), rows.pieces.itemsize], dtype=np.int64)
        with replacing(self._path(epoch)) as path, open(path, "xb") as file:
            for array in (header, rows.row_starts, rows.pieces):
                file.write(np.ascontiguousarray(array).data)

    def _remove_old(self, epoch: int) -> None:
        for path in self.folder.glob(f"{self.stem}-*.rows"):
            if path < self._path(epoch - 1):
                path.unlink(missing_ok=True)
        remove_stale(self.folder / self.stem)
