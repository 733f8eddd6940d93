"""Shows the progress of preprocessing: a bar by bytes on a terminal, else a line every `log_interval` documents."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def reading_progress(total_bytes: int, log_interval: int) -> Iterator[Callable[[int, int], None]]:
    """A context with a function that reports the bytes read and the documents so far on standard error.

    `total_bytes`: 0 if unknown.
    """
    start_s, next_line = time.monotonic(), log_interval
    without_terminal = {} if sys.stderr.isatty() else {"disable": True}  # on one, TQDM_DISABLE decides
    with tqdm(total=total_bytes or None, unit="B", unit_scale=True, desc="proteins", **without_terminal) as bar:

        def show(bytes_read: int, num_documents: int) -> None:
            nonlocal next_line
            if not bar.disable:
                bar.update(bytes_read - bar.n)
            elif num_documents >= next_line:
                next_line = num_documents + log_interval
                elapsed_s = max(time.monotonic() - start_s, 1e-9)
                share = f", {bytes_read / total_bytes:.0%}" if total_bytes else ""
                print(f"Processed {num_documents} documents ({num_documents / elapsed_s:.0f} docs/s, "
                      f"{bytes_read / elapsed_s / 1e6:.1f} MB/s{share}).", file=sys.stderr, flush=True)

        yield show
