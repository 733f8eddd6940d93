"""Row indices on disk: whole or absent, built once, never waited for in vain."""

import fcntl
import multiprocessing
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.config import DataConfig
from megatron.data.corpus.indexed_writer import write_indexed
from megatron.data.corpus.vocab import Vocab
from megatron.data.rows import cache_files
from megatron.data.rows.cache_files import choose_cache_folder, replacing
from megatron.data.rows.dataset import build_datasets
from megatron.data.rows.packing import PackedRows
from megatron.data.rows.row_cache import RowCache
from megatron.errors import ConfigError

VOCAB = Vocab.from_file()


def some_rows(dtype=np.uint32) -> PackedRows:
    return PackedRows(np.array([3, 1, 2, 0], dtype=dtype), np.array([0, 1, 4]))


def refuse() -> PackedRows:
    raise AssertionError("built again")


@pytest.mark.parametrize("dtype", [np.uint32, np.int64])
def test_rows_are_built_once_and_then_mapped(tmp_path, dtype):
    cache = RowCache(tmp_path, "a")
    for build in (lambda: some_rows(dtype), refuse):
        rows = cache.rows(0, build)
        assert rows.pieces.dtype == dtype and rows.row(1).tolist() == [1, 2, 0] and len(rows) == 2
        assert cache.num_rows(0, build) == 2


def test_a_damaged_file_is_built_again(tmp_path):
    cache = RowCache(tmp_path, "a")
    cache.rows(0, some_rows)
    path, = tmp_path.glob("*.rows")
    whole = path.read_bytes()
    for damaged in (b"", whole[:10], whole[:-1], b"x" * len(whole)):
        path.write_bytes(damaged)
        assert cache.rows(0, some_rows).row(0).tolist() == [3]
        assert path.read_bytes() == whole


def test_two_epochs_are_kept_and_the_row_counts_of_all(tmp_path):
    cache = RowCache(tmp_path, "a")
    for epoch in range(5):
        cache.num_rows(epoch, some_rows)
    assert [path.name for path in sorted(tmp_path.glob("*.rows"))] == ["a-000003.rows", "a-000004.rows"]
    assert [RowCache(tmp_path, "a").num_rows(epoch, refuse) for epoch in range(5)] == [2] * 5


def build_slowly(folder: Path, builds) -> None:
    def build() -> PackedRows:
        with builds.get_lock():
            builds.value += 1
        time.sleep(0.1)
        return some_rows()
    assert RowCache(folder, "a").rows(0, build).row(1).tolist() == [1, 2, 0]


def test_ranks_that_start_together_build_once(tmp_path):
    context = multiprocessing.get_context("fork")
    builds = context.Value("i", 0)
    ranks = [context.Process(target=build_slowly, args=(tmp_path, builds)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert builds.value == 1 and not list(tmp_path.glob("*.tmp"))


def test_a_rank_that_hangs_with_the_lock_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_files, "LONGEST_WAIT_S", 0.05)
    with open(tmp_path / "a.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert len(RowCache(tmp_path, "a").rows(0, some_rows)) == 2


def test_what_a_killed_process_left_behind_is_removed_in_time(tmp_path):
    old, new = tmp_path / "a-1.tmp", tmp_path / "a-2.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    RowCache(tmp_path, "a").rows(0, some_rows)
    assert new.exists() and not old.exists()


def test_a_file_that_cannot_be_written_leaves_nothing_and_says_so(tmp_path):
    with pytest.raises(ConfigError, match="a.rows: cannot be written .*--data-cache-path"), \
            replacing(tmp_path / "a.rows") as path:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_the_name_carries_everything_that_rows_depend_on(tmp_path: Path) -> None:
    for name, length in (("a", 5), ("b", 6)):
        write_indexed(tmp_path / name, [np.full(length, 7)] * 40)
    (tmp_path / "clusters").write_text("0\t0\n0\t1\n")
    base = DataConfig(data_path=(str(tmp_path / "a"),), split="1", seq_length=16,
                      data_cache_path=str(tmp_path / "cache"))
    changes: list[dict[str, Any]] = [
        {}, {"split": "3,1"}, {"seq_length": 17}, {"packing": "sequential"}, {"long_proteins": "drop"},
        {"data_path": (str(tmp_path / "b"),)}, {"blend_by": "cluster", "cluster_file": str(tmp_path / "clusters")}]
    for data, seed in [*((replace(base, **change), 1) for change in changes), (base, 2)]:
        build_datasets(data, VOCAB, seed)
    assert len(list((tmp_path / "cache").glob("*-train-*.rows"))) == len(changes) + 1


def test_the_folder_is_the_given_one_else_beside_the_data_else_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    prefix = str(tmp_path / "data" / "a")
    assert choose_cache_folder(prefix, str(tmp_path / "given")) == tmp_path / "given"
    assert choose_cache_folder(prefix, None) == tmp_path / "data" / "row_index"
    read_only = tmp_path / "file"
    read_only.touch()  # nothing can be made in it, whoever asks
    assert choose_cache_folder(str(read_only / "a"), None) == tmp_path / "home" / ".cache" / "protein-rows"
    with pytest.raises(ConfigError, match="--data-cache-path"):
        choose_cache_folder(prefix, str(read_only / "given"))


def test_threads_may_build_different_epochs_at_once(tmp_path):
    cache = RowCache(tmp_path, "a")
    threads = [threading.Thread(target=cache.num_rows, args=(epoch, some_rows)) for epoch in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [cache.num_rows(epoch, some_rows) for epoch in (0, 1)] == [2, 2]
