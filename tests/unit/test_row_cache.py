"""Row indices cached on disk: complete or absent, built once, and never waited for in vain."""

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

from megatron import files
from megatron.config import DataConfig
from megatron.data.corpus.vocab import Vocab
from megatron.data.rows import dataset
from megatron.data.rows.cache_files import choose_cache_folder, keeping
from megatron.data.rows.dataset import build_datasets
from megatron.data.rows.packing import PackedRows
from megatron.data.rows.row_cache import RowCache
from megatron.errors import ConfigError
from megatron.files import locked
from tests.indexed_files import write_indexed

VOCAB = Vocab.from_file()


def some_rows(dtype=np.uint32) -> PackedRows:
    return PackedRows(np.array([3, 1, 2, 0], dtype=dtype), np.array([0, 1, 4]))


def pack(epoch: int) -> PackedRows:
    return some_rows()


def refuse(epoch: int) -> PackedRows:
    raise AssertionError("built again")


@pytest.mark.parametrize("dtype", [np.uint32, np.int64])
def test_rows_are_built_once_and_then_mapped(tmp_path, dtype):
    cache = RowCache(tmp_path, "a")
    for build in (lambda epoch: some_rows(dtype), refuse):
        rows = cache.rows(0, build)
        assert rows.pieces.dtype == dtype and rows.row(1).tolist() == [1, 2, 0] and len(rows) == 2


def test_a_damaged_file_is_built_again_with_one_note(tmp_path, capsys):
    cache = RowCache(tmp_path, "a")
    cache.rows(0, pack)
    path, = tmp_path.glob("*.rows")
    whole = path.read_bytes()
    for damaged in (b"", whole[:10], whole[:-1], b"x" * len(whole)):
        path.write_bytes(damaged)
        assert cache.rows(0, pack).row(0).tolist() == [3]
        assert path.read_bytes() == whole
        assert capsys.readouterr().err == f"note: {path} is damaged, so its rows are packed again\n"


def count(folder: Path, sample: int, pack) -> list[int]:
    first_samples = [0]
    RowCache(folder, "a").count(first_samples, sample, pack)
    return first_samples


def test_two_epochs_are_kept_and_the_row_counts_of_all(tmp_path):
    for sample in range(10):
        assert count(tmp_path, sample, pack)[-1] > sample
    assert [path.name for path in sorted(tmp_path.glob("*.rows"))] == ["a-000003.rows", "a-000004.rows"]
    assert count(tmp_path, 9, refuse) == [0, 2, 4, 6, 8, 10]


def test_counting_thousands_of_past_epochs_writes_two_files(tmp_path):
    assert len(count(tmp_path, 9_999, pack)) == 5001
    assert {path.suffix for path in tmp_path.iterdir()} == {".rows", ".counts", ".lock"}
    assert [path.name for path in tmp_path.glob("*.rows")] == ["a-004999.rows"]
    assert count(tmp_path, 9_999, refuse)[-1] == 10_000


def test_damaged_counts_are_counted_again(tmp_path):
    count(tmp_path, 5, pack)
    path = tmp_path / "a.counts"
    whole = path.read_bytes()
    for damaged in (b"", b'{"0": 2}', whole[:-8], whole[:-1] + b"x", b"x" * len(whole)):
        path.write_bytes(damaged)
        assert count(tmp_path, 5, pack) == [0, 2, 4, 6]
        assert path.read_bytes() == whole


def build_slowly(folder: Path, builds) -> None:
    def build(epoch: int) -> PackedRows:
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
    assert builds.value == 1 and not list(files.left_over(tmp_path / "a"))


def test_a_rank_that_hangs_with_the_lock_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_WAIT_S", 0.05)
    with open(tmp_path / "a.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert len(RowCache(tmp_path, "a").rows(0, pack)) == 2


def test_one_that_packs_many_proteins_is_waited_for_longer(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_WAIT_S", 0.05)
    with locked(tmp_path / "a.lock"):
        began_s = time.monotonic()
        RowCache(tmp_path, "a", num_pieces=300_000).rows(0, pack)
    assert time.monotonic() - began_s > 0.3


def test_what_a_killed_process_left_behind_is_removed_in_time(tmp_path):
    old, new = tmp_path / ".unfinished-a-1", tmp_path / ".unfinished-a-2"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    RowCache(tmp_path, "a").rows(0, pack)
    assert new.exists() and not old.exists()


def test_a_file_that_cannot_be_written_leaves_nothing_and_says_so(tmp_path, capsys):
    with keeping(tmp_path / "a.rows") as file:
        file.write(b"half")
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())
    note = capsys.readouterr().err
    assert "a.rows: cannot be written (No space left on device)" in note and "--data-cache-path" in note


def test_a_file_that_cannot_even_be_begun_stops_nobody(tmp_path, capsys):
    with keeping(tmp_path / "gone" / "a.rows") as file:
        file.write(b"worked out")
    assert "gone/a.rows: cannot be written (No such file or directory)" in capsys.readouterr().err


def test_what_another_user_closed_to_us_is_worked_out_in_memory(tmp_path):
    """Folders stand under the names of the files: like a file of another user they can be neither read nor replaced."""
    for name in ("a-000002.rows", "a.counts", "a.lock"):
        (tmp_path / name / "x").mkdir(parents=True)
    assert count(tmp_path, 5, pack) == [0, 2, 4, 6]
    assert RowCache(tmp_path, "a").rows(2, pack).row(1).tolist() == [1, 2, 0]


def test_a_lock_that_may_only_be_read_is_held_all_the_same(tmp_path, monkeypatch):
    def open_read_only(path, flags, mode=0o777, open_file=os.open):
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError(13, "Permission denied")
        return open_file(path, flags, mode)
    (tmp_path / "a.lock").touch()
    monkeypatch.setattr(os, "open", open_read_only)
    with locked(tmp_path / "a.lock"), open(tmp_path / "a.lock") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_name_carries_everything_that_rows_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "IN_MEMORY_DOCUMENTS", 0)
    for name, length in (("a", 5), ("b", 6)):
        write_indexed(tmp_path / name, [np.full(length, 7)] * 40)
    (tmp_path / "clusters").write_text("0\t0\n0\t1\n")
    base = DataConfig(data_path=(str(tmp_path / "a"),), split="1", seq_length=16,
                      data_cache_path=str(tmp_path / "cache"))
    changes: list[dict[str, Any]] = [
        {}, {"split": "3,1"}, {"seq_length": 17}, {"packing": "sequential"}, {"long_proteins": "drop"},
        {"protein_ends": "both"},
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


def test_the_users_folder_is_asked_for_only_where_it_is_needed(tmp_path, monkeypatch):
    def has_no_home():
        raise RuntimeError("Could not determine home directory.")
    monkeypatch.setattr(Path, "home", has_no_home)
    assert choose_cache_folder(str(tmp_path / "a"), None) == tmp_path / "row_index"
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="^[^ ]*/file/row_index cannot be written"):
        choose_cache_folder(str(tmp_path / "file" / "a"), None)


def test_threads_may_build_different_epochs_at_once(tmp_path):
    cache = RowCache(tmp_path, "a")
    threads = [threading.Thread(target=cache.rows, args=(epoch, pack)) for epoch in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(cache.rows(epoch, refuse)) for epoch in (0, 1)] == [2, 2]
