"""Micro-batches hold the same samples for every number of ranks and workers and after every restart."""

import atexit
import errno
import itertools
import multiprocessing
import os
import signal
import time
import warnings
import weakref
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from multiprocessing.synchronize import SemLock

import numpy as np
import pytest
import torch

from megatron.config import DataConfig
from megatron.data.batches.batch import batch_shape
from megatron.data.batches.loader import batches, micro_batch_samples
from megatron.data.corpus.vocab import Vocab
from megatron.data.rows.dataset import Dataset, Splits, build_datasets
from megatron.errors import ConfigError, DataError
from tests.indexed_files import write_indexed

VOCAB = Vocab.from_file()


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    rng = np.random.default_rng(0)
    prefix = str(tmp_path_factory.mktemp("data") / "a")
    write_indexed(prefix, [rng.choice(VOCAB.residue_ids, length) for length in rng.integers(1, 80, 300)])
    return build_datasets(DataConfig(data_path=(prefix,), seq_length=64, split="1,1,0"), VOCAB, 1)


@pytest.fixture(scope="module")
def train(splits):
    return splits.train


def tensors(batch):
    return [*batch.sequence.tensors(), *batch.targets.tensors()]


def assert_same(left, right):
    for a, b in zip(tensors(left), tensors(right), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    numbers = [(batch.num_targets, batch.num_residues, batch.num_tokens, batch.num_pairs, batch.sequence.max_length,
                batch.sequence.num_filler) for batch in (left, right)]
    assert numbers[0] == numbers[1]


def load(dataset, micro_batch_size=1, shape=None, **options):
    options = {"start_sample": 0, "data_rank": 0, "data_size": 1, "num_workers": 0, "pin": False, **options}
    shape = shape or batch_shape(Splits(dataset, None, None), micro_batch_size)
    return batches(dataset, shape, micro_batch_size=micro_batch_size, **options)


def take(dataset, count, **options):
    loader = load(dataset, **options)
    try:
        return list(itertools.islice(loader, count))
    finally:
        loader.close()


def test_every_micro_batch_of_a_run_has_one_shape_also_last_and_empty_ones(splits):
    shape = batch_shape(splits, micro_batch_size=3)
    epochs = take(splits.train, splits.train.num_epoch_rows(0), micro_batch_size=3, shape=shape)
    own = replace(shape, num_targets=splits.valid.most_targets(3))
    tails = [take(splits.valid, 99, micro_batch_size=3, shape=own, data_rank=rank, data_size=4, stop_sample=26)
             for rank in range(4)]
    assert tails[3][-1].num_tokens == 0
    for every in (epochs, [*itertools.chain(*tails)]):
        assert len({tuple((tensor.shape, tensor.dtype) for tensor in tensors(batch)) for batch in every}) == 1
        assert len({(batch.sequence.max_length, batch.sequence.num_filler) for batch in every}) == 1


def test_the_shape_leaves_room_for_the_proteins_of_later_epochs(train):
    shape, num_rows = batch_shape(Splits(train, None, None), 6), sum(map(train.num_epoch_rows, range(8)))
    most = max(train.most_proteins(6, start) for start in range(0, num_rows, train.num_epoch_rows(0)))
    assert most > train.most_proteins(6)
    epochs = take(train, num_rows // 6, micro_batch_size=6, shape=shape)
    assert len({len(batch.sequence.cu_seqlens) for batch in epochs}) == 1


def test_two_workers_serve_the_batches_that_none_does(train):
    alone, ahead = (take(train, 30, micro_batch_size=2, num_workers=workers) for workers in (0, 2))
    for pair in zip(alone, ahead, strict=True):
        assert_same(*pair)


def test_more_workers_than_cores_are_no_matter_for_a_warning(train, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with closing(load(train, num_workers=2)) as loader:
            next(loader)


@pytest.mark.parametrize("data_size, micro_batch_size", [(1, 12), (2, 3), (4, 1), (3, 4)])
def test_a_step_holds_the_same_samples_on_any_number_of_ranks(data_size, micro_batch_size):
    streams = [micro_batch_samples(24, None, micro_batch_size, rank, data_size) for rank in range(data_size)]
    micro_batches = 12 // (data_size * micro_batch_size)
    for step in range(3):
        samples = [sample for _ in range(micro_batches) for stream in streams for sample in next(stream)]
        assert samples == list(range(24 + 12 * step, 36 + 12 * step))


def test_resuming_on_other_ranks_serves_the_samples_that_would_have_come(train):
    whole = take(train, 40)
    resumed = [take(train, 5, start_sample=30, data_rank=rank, data_size=2) for rank in (0, 1)]
    for k in range(5):
        for rank in (0, 1):
            assert_same(resumed[rank][k], whole[30 + 2 * k + rank])


def test_each_micro_batch_of_each_rank_has_dropout_of_its_own(train):
    seeds = [int(batch.sequence.seed) for rank in (0, 1) for batch in take(train, 9, data_rank=rank, data_size=2)]
    assert len(set(seeds)) == len(seeds)


def test_a_ragged_tail_gives_every_rank_as_many_batches(train):
    ranks = [take(train, 99, micro_batch_size=2, data_rank=rank, data_size=3, stop_sample=9) for rank in range(3)]
    held = [[tokens_in(train, *rows) for rows in rank] for rank in
            ([(0, 2), (6, 8)], [(2, 4), (8, 9)], [(4, 6), (9, 9)])]
    assert [[batch.num_tokens for batch in rank] for rank in ranks] == held


def tokens_in(dataset, first, last):
    return sum(len(dataset[sample].tokens_t) for sample in range(first, last))


def test_a_closed_loader_gives_no_more(train):
    loader = load(train, num_workers=1)
    next(loader)
    loader.close()
    with pytest.raises(StopIteration):
        next(loader)


def test_a_mistake_in_the_data_reaches_the_trainer_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron.data.rows.dataset.corpus_vocabulary", lambda data: VOCAB)  # a sample may miss it
    write_indexed(tmp_path / "a", [np.full(60, 6)] * 20 + [np.full(60, 99)])
    data = DataConfig(data_path=(str(tmp_path / "a"),), seq_length=64, split="1", mmap_warmup=True)
    with pytest.raises(DataError, match="^[^\n]*document 20 holds ids 99 to 99[^\n]*$"):
        take(build_datasets(data, VOCAB, 1).train, 40, num_workers=2)


def test_a_full_shared_memory_is_told_before_a_worker_starts(train, monkeypatch):
    others = set(multiprocessing.active_children())  # ranks of other tests that wait for work
    make, live, room = SemLock.__init__, weakref.WeakSet(), 14  # what two workers need

    def make_if_room(lock, *args, **options):
        if len(live) == room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        make(lock, *args, **options)
        live.add(lock)

    monkeypatch.setattr(SemLock, "__init__", make_if_room)
    assert len(take(train, 3, num_workers=2)) == 3
    room = 13
    with pytest.raises(ConfigError, match=r"--num-workers 2: /dev/shm refuses the locks of the worker processes \(No "
                                          r"space left on device\); make room there, or give --num-workers 0$"):
        take(train, 3, num_workers=2)
    assert set(multiprocessing.active_children()) <= others


def test_workers_leave_signals_to_the_trainer(train):
    others = set(multiprocessing.active_children())
    loader = load(train, num_workers=2)
    next(loader)
    workers = [process for process in multiprocessing.active_children() if process not in others]
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(worker.pid or 0, number)
    for _ in range(50):
        next(loader)
    loader.close()
    for worker in workers:
        worker.join(5)
    assert not any(worker.is_alive() for worker in workers)


def test_a_process_that_fails_does_not_wait_for_its_workers(train: Dataset) -> None:
    def fail() -> None:
        loader = load(train, num_workers=1)
        held.append(loader)
        next(loader)
        raise SystemExit(3)

    held: list[object] = []
    process = multiprocessing.get_context("fork").Process(target=_run_and_exit, args=(fail,))
    process.start()
    process.join(20)
    assert process.exitcode == 3


def _run_and_exit(action: Callable[[], None]) -> None:
    """Runs an action in a forked process that then leaves as an interpreter does, `atexit` included."""
    try:
        action()
    except SystemExit as leaving:
        atexit._run_exitfuncs()
        os._exit(int(str(leaving)))


def test_the_next_epochs_rows_are_built_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron.data.rows.dataset.IN_MEMORY_DOCUMENTS", 0)
    write_indexed(tmp_path / "a", [np.full(30, 6)] * 200)
    train = build_datasets(DataConfig(data_path=(str(tmp_path / "a"),), seq_length=64, split="1"), VOCAB, 1).train
    loader = load(train, num_workers=1)
    next(loader)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("row_index/*-000001.rows")) and time.monotonic() < deadline:
        time.sleep(0.01)
    loader.close()
    assert list(tmp_path.glob("row_index/*-000001.rows"))
