"""Prepares micro-batches ahead of the training step in worker processes, for each data-parallel rank its own.

Micro-batch k of rank r holds `micro` samples from start + (k x ranks + r) x micro on, as in Megatron. So the samples of
a step are the same for any number of ranks.
"""

import atexit
import signal
import warnings
from collections.abc import Iterator
from itertools import count
from typing import Any

from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from megatron.data.batches.batch import Batch, BatchShape, collate
from megatron.data.batches.order import Windows, sample_at
from megatron.data.rows.dataset import Dataset
from megatron.errors import ConfigError, DataError
from megatron.files import check_shared_memory
from megatron.parallel.randomness import dropout_seed

BATCHES_AHEAD = 4  # for each worker


def batches(dataset: Dataset, shape: BatchShape, *, start_sample: int, micro_batch_size: int, data_rank: int,
            data_size: int, num_workers: int, pin: bool, stop_sample: int | None = None,
            seed: int = 0, left_out: Windows = ()) -> "BatchIterator":
    """An iterator over one rank's micro-batches from `start_sample` on, endless or up to `stop_sample`; close it.

    With `stop_sample` every rank gets equally many micro-batches; the last ones may hold fewer rows, or none. `seed`:
    of the run, from which each micro-batch's dropout seed is derived. `left_out`: samples of the dataset to skip;
    `start_sample` and `stop_sample` count the other samples only. Raises ConfigError or DataError.
    """
    samples = micro_batch_samples(start_sample, stop_sample, micro_batch_size, data_rank, data_size)
    dataset[sample_at(start_sample, left_out)]  # raises errors here, and builds the row index once for all workers
    return BatchIterator(_Batches(dataset, shape, seed, left_out), samples, num_workers, pin)


def micro_batch_samples(start: int, stop: int | None, micro_batch_size: int, data_rank: int, data_size: int
                        ) -> Iterator[range]:
    """The sample numbers of each micro-batch of one rank, in order."""
    for step_start in count(start, micro_batch_size * data_size):
        if stop is not None and step_start >= stop:
            return
        first = step_start + data_rank * micro_batch_size
        last = first + micro_batch_size
        yield range(first, last) if stop is None else range(min(first, stop), min(last, stop))


class BatchIterator(Iterator[Batch]):
    """An iterator over batches that owns worker processes; they end when it is closed, or with this process.

    Workers block SIGINT and SIGTERM: on these signals the training process saves a checkpoint and then closes them.
    Errors in the data are raised here as ConfigError or DataError.
    """

    def __init__(self, dataset: "_Batches", samples: Iterator[range], num_workers: int, pin: bool) -> None:
        options: dict[str, Any] = {}
        if num_workers:
            # Checked before torch makes them, as it leaves workers behind when a lock fails: 3 a worker, and 8 more.
            check_shared_memory(8 + 3 * num_workers, f"--num-workers {num_workers}", "--num-workers 0")
            # Forked explicitly, since it is not the default in Python 3.14: workers must inherit the signal mask below.
            options = {"prefetch_factor": BATCHES_AHEAD, "worker_init_fn": _build_ahead,
                       "multiprocessing_context": "fork"}
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))  # workers inherit it
        try:
            with warnings.catch_warnings():  # each rank and split would say twice that workers outnumber cores
                warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
                loader = DataLoader(dataset, batch_size=None, sampler=samples, num_workers=num_workers,
                                    pin_memory=pin, **options)
                self._batches: Iterator[Batch | ValueError] | None = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        if num_workers:
            atexit.register(self.close)  # else multiprocessing would wait for them, as they block SIGTERM

    def __next__(self) -> Batch:
        if self._batches is None:
            raise StopIteration
        batch = next(self._batches)
        if isinstance(batch, ValueError):
            raise batch
        return batch

    def close(self) -> None:
        """End the worker processes."""
        atexit.unregister(self.close)
        shut_down = getattr(self._batches, "_shutdown_workers", None)  # torch calls it when the iterator is deleted
        if shut_down is not None:
            shut_down()
        self._batches = None


class _Batches(TorchDataset):
    """A dataset whose items are whole micro-batches, indexed by ranges of sample numbers.

    Errors in the data are returned as items, because an exception in a worker would reach the user with a traceback.
    """

    def __init__(self, dataset: Dataset, shape: BatchShape, seed: int, left_out: Windows) -> None:
        self.dataset, self._shape, self._seed, self._left_out = dataset, shape, seed, left_out

    def __getitem__(self, samples: range) -> Batch | ValueError:
        try:
            return collate([self.dataset[sample_at(sample, self._left_out)] for sample in samples], self._shape,
                           dropout_seed(self._seed, samples.start))
        except (ConfigError, DataError) as error:
            return error


def _build_ahead(worker: int) -> None:
    info = get_worker_info()
    assert info is not None and isinstance(info.dataset, _Batches)
    info.dataset.dataset.build_ahead()
