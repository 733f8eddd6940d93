"""Shows the progress of preprocessing: a bar by bytes on a terminal, else a line every `log_interval` documents."""

import sys
import time
from types import TracebackType

from tqdm import tqdm


class ReadingProgress:
    """A context in which `show` reports progress on standard error; `total_bytes`: 0 if unknown."""

    def __init__(self, total_bytes: int, log_interval: int) -> None:
        self._total, self._interval = total_bytes, log_interval
        self._start_s, self._next_line = time.monotonic(), log_interval
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_bytes or None, unit="B", unit_scale=True, desc="proteins")

    def __enter__(self) -> "ReadingProgress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, bytes_read: int, num_documents: int) -> None:
        """Report the totals so far."""
        if self._bar is not None:
            self._bar.update(bytes_read - self._bar.n)
        elif num_documents >= self._next_line:
            self._next_line = num_documents + self._interval
            elapsed_s = max(time.monotonic() - self._start_s, 1e-9)
            share = f", {bytes_read / self._total:.0%}" if self._total else ""
            print(f"Processed {num_documents} documents ({num_documents / elapsed_s:.0f} docs/s, "
                  f"{bytes_read / elapsed_s / 1e6:.1f} MB/s{share}).", file=sys.stderr, flush=True)
