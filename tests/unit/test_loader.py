"""Micro-batches: the same samples whatever the ranks, workers and restarts."""

import atexit
import multiprocessing
import os
import signal
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from megatron.config import DataConfig
from megatron.data.batches.batch import collate
from megatron.data.batches.loader import MicroBatchSamples, batches
from megatron.data.corpus.indexed_writer import write_indexed
from megatron.data.corpus.vocab import Vocab
from megatron.data.rows.dataset import Dataset, build_datasets
from megatron.errors import DataError

VOCAB = Vocab.from_file()


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    rng = np.random.default_rng(0)
    prefix = str(tmp_path_factory.mktemp("data") / "a")
    write_indexed(prefix, [rng.choice(VOCAB.residue_ids, length) for length in rng.integers(1, 80, 150)])
    return build_datasets(DataConfig(data_path=(prefix,), seq_length=64, split="1,0,0"), VOCAB, 1).train


def tensors(batch):
    return [batch.tokens_t, batch.positions_t, batch.cu_seqlens, batch.target_positions_m, batch.target_ids_m]


def assert_same(left, right):
    assert left.lengths == right.lengths
    assert (left.num_residues, left.num_positions) == (right.num_residues, right.num_positions)
    for a, b in zip(tensors(left), tensors(right), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def take(train, count, **options):
    options = {"start_sample": 0, "micro_batch_size": 2, "data_rank": 0, "data_size": 1, "num_workers": 0, "pin": False,
               **options}
    loader = batches(train, **options)
    try:
        return [batch for batch, _ in zip(loader, range(count), strict=False)]
    finally:
        loader.close()


def test_a_batch_is_its_rows_flat(train):
    rows = [train[sample] for sample in range(3)]
    batch = collate(rows, 64)
    assert batch.tokens_t.tolist() == [token for row in rows for token in row.tokens_t]
    assert batch.lengths == tuple(length for row in rows for length in row.lengths)
    assert batch.positions_t.tolist() == [place for length in batch.lengths for place in range(length)]
    assert batch.cu_seqlens.tolist() == [sum(batch.lengths[:i]) for i in range(len(batch.lengths) + 1)]
    assert batch.num_residues == int((batch.positions_t > 0).sum()) and batch.num_positions == 3 * 64
    assert batch.cu_seqlens.dtype == torch.int32 and batch.tokens_t.dtype == torch.int64
    restored = batch.tokens_t.clone()
    restored[batch.target_positions_m] = batch.target_ids_m
    expected = []
    for row in rows:
        tokens = row.tokens_t.copy()
        tokens[row.target_positions_m] = row.target_ids_m
        expected += tokens.tolist()
    assert restored.tolist() == expected
    assert_same(batch.to("cpu"), batch)


def test_two_workers_serve_the_batches_that_none_does(train):
    for alone, ahead in zip(take(train, 30), take(train, 30, num_workers=2), strict=True):
        assert_same(alone, ahead)


@pytest.mark.parametrize("data_size, micro_batch_size", [(1, 12), (2, 3), (4, 1), (3, 4)])
def test_a_step_holds_the_same_samples_on_any_number_of_ranks(data_size, micro_batch_size):
    streams = [iter(MicroBatchSamples(24, None, micro_batch_size, rank, data_size)) for rank in range(data_size)]
    micro_batches = 12 // (data_size * micro_batch_size)
    for step in range(3):
        samples = [sample for _ in range(micro_batches) for stream in streams for sample in next(stream)]
        assert samples == list(range(24 + 12 * step, 36 + 12 * step))


def test_resuming_on_other_ranks_serves_the_samples_that_would_have_come(train):
    whole = take(train, 40, micro_batch_size=1)
    resumed = [take(train, 5, start_sample=30, micro_batch_size=1, data_rank=rank, data_size=2) for rank in (0, 1)]
    for k in range(5):
        for rank in (0, 1):
            assert_same(resumed[rank][k], whole[30 + 2 * k + rank])


def test_a_ragged_tail_gives_every_rank_as_many_batches(train):
    ranks = [take(train, 99, micro_batch_size=2, data_rank=rank, data_size=3, stop_sample=9) for rank in range(3)]
    assert [[batch.num_positions // 64 for batch in rank] for rank in ranks] == [[2, 2], [2, 1], [2, 0]]
    empty = ranks[2][1]
    assert empty.lengths == () and empty.cu_seqlens.tolist() == [0] and empty.num_residues == 0
    assert all(len(tensor) == 0 for tensor in tensors(empty) if tensor is not empty.cu_seqlens)
    assert [tensor.dtype for tensor in tensors(empty)] == [tensor.dtype for tensor in tensors(ranks[0][0])]


def test_a_closed_loader_gives_no_more(train):
    loader = batches(train, start_sample=0, micro_batch_size=1, data_rank=0, data_size=1, num_workers=1, pin=False)
    next(loader)
    loader.close()
    with pytest.raises(StopIteration):
        next(loader)


def test_a_mistake_in_the_data_reaches_the_trainer_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron.data.rows.dataset.check_vocabulary", lambda *what: None)  # a sample may miss it
    write_indexed(tmp_path / "a", [np.full(60, 6)] * 20 + [np.full(60, 99)])
    data = DataConfig(data_path=(str(tmp_path / "a"),), seq_length=64, split="1", mmap_warmup=True)
    with pytest.raises(DataError, match="^[^\n]*document 20 holds ids 99 to 99[^\n]*$"):
        take(build_datasets(data, VOCAB, 1).train, 40, num_workers=2)


def test_workers_leave_signals_to_the_trainer(train):
    loader = batches(train, start_sample=0, micro_batch_size=1, data_rank=0, data_size=1, num_workers=2, pin=False)
    next(loader)
    workers = multiprocessing.active_children()
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
        loader = batches(train, start_sample=0, micro_batch_size=1, data_rank=0, data_size=1, num_workers=1, pin=False)
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


def test_the_next_epochs_rows_are_built_ahead(tmp_path):
    write_indexed(tmp_path / "a", [np.full(30, 6)] * 200)
    train = build_datasets(DataConfig(data_path=(str(tmp_path / "a"),), seq_length=64, split="1"), VOCAB, 1).train
    loader = batches(train, start_sample=0, micro_batch_size=1, data_rank=0, data_size=1, num_workers=1, pin=False)
    next(loader)
    deadline = time.monotonic() + 5
    while not list(tmp_path.glob("row_index/*-000001.rows")) and time.monotonic() < deadline:
        time.sleep(0.01)
    loader.close()
    assert list(tmp_path.glob("row_index/*-000001.rows"))
