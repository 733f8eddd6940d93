"""Runs `encode_block` on a stream of blocks in order, in this process or in a pool of processes."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from megatron.data.preprocess.encode import EncodedDocuments, Encoding, encode_block
from megatron.data.sources.block import RecordBlock
from megatron.errors import DataError
from megatron.files import check_shared_memory

_BLOCKS_AHEAD_PER_WORKER = 2
_LOCKS_OF_POOL = 8  # with room to spare: its two queues need 5
_Mark = TypeVar("_Mark")


def encoded_blocks(encoding: Encoding, blocks: Iterator[tuple[_Mark, RecordBlock]],
                   num_workers: int) -> Iterator[tuple[_Mark, list[EncodedDocuments]]]:
    """Each block's mark and its documents under each key, in the order of the blocks; raises ConfigError or DataError.

    `blocks`: each with a mark, any value that is passed through.
    """
    if num_workers == 1:
        for mark, block in blocks:
            yield mark, encode_block(encoding, block)
        return
    check_shared_memory(_LOCKS_OF_POOL, f"--workers {num_workers}", "--workers 1")
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    pending: deque[tuple[_Mark, Future[list[EncodedDocuments]]]] = deque()
    try:
        for mark, block in blocks:
            pending.append((mark, pool.submit(encode_block, encoding, block)))
            if len(pending) > _BLOCKS_AHEAD_PER_WORKER * num_workers:
                first, encoded = pending.popleft()
                yield first, encoded.result()
        while pending:
            first, encoded = pending.popleft()
            yield first, encoded.result()
    except BrokenProcessPool:  # raised by `result` or by `submit`
        raise DataError("a worker process died, perhaps for want of memory; fewer --workers need less") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Ignore Ctrl-C, which the main process handles, and exit when the main process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """Wait for the end of the main process, then exit."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
