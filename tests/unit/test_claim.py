"""A run's folder takes one run at a time: its lock tells a live holder from a dead one, on this host and on another."""

import errno
import json
import os
import signal
import threading
import time

import pytest

from megatron.checkpoint import claim as module
from megatron.checkpoint.claim import LOCK, Claim, claimed
from megatron.errors import CheckpointError, ConfigError
from megatron.log import Log
from megatron.parallel.mesh import Mesh

MOST_S = 100  # for what takes 0.3 s on a computer that does nothing else, and three minutes or a day where it is wrong


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(module, "BEAT_S", 0.02)
    monkeypatch.setattr(module, "STALE_S", 0.3)
    monkeypatch.setattr(module, "SETTLE_S", 0.01)


def acquired(folder, said=None):
    claim = Claim(folder)
    claim.acquire((said if said is not None else []).append)
    return claim


def move_to_another_host(lock, **values):
    """The holder of the lock becomes one that cannot be asked."""
    lock.write_text(json.dumps({**json.loads(lock.read_text()), "machine": "another", "host": "node7", **values}))


def test_a_folder_that_a_living_process_holds_is_refused_until_it_is_released(tmp_path):
    first = acquired(tmp_path)
    with pytest.raises(ConfigError, match=rf"--save {tmp_path} is in use by process {os.getpid()} on "):
        acquired(tmp_path)
    first.release()
    acquired(tmp_path).release()
    assert not list(tmp_path.iterdir())


def test_folders_that_were_made_for_a_run_that_wrote_nothing_go_again(tmp_path):
    acquired(tmp_path / "runs" / "mine").release()
    assert not list(tmp_path.iterdir())
    claim = acquired(tmp_path / "runs" / "mine")
    (tmp_path / "runs" / "file").touch()
    claim.release()
    assert [path.name for path in tmp_path.rglob("*")] == ["runs", "file"]


def test_a_process_that_was_killed_leaves_the_folder_free_at_once(tmp_path):
    child = os.fork()
    if child == 0:
        acquired(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # dead, but its number is not given back yet
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == child
    said = []
    acquired(tmp_path, said).release()
    assert not said
    os.waitpid(child, 0)


def test_a_process_number_that_another_process_has_by_now_holds_nothing(tmp_path):
    acquired(tmp_path)._is_released.set()
    lock = tmp_path / LOCK
    lock.write_text(json.dumps({**json.loads(lock.read_text()), "started": "1", "token": "of another"}))
    acquired(tmp_path).release()


def test_a_holder_on_another_host_lives_while_its_lock_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STALE_S", 60)
    other = acquired(tmp_path)
    other._me |= {"machine": "another", "host": "node7"}
    move_to_another_host(tmp_path / LOCK)
    with pytest.raises(ConfigError, match="in use by process .* on node7"):
        acquired(tmp_path)
    other.release()


def test_a_holder_on_another_host_that_rests_is_dead_after_a_while(tmp_path):
    acquired(tmp_path)._is_released.set()
    time.sleep(0.05)
    move_to_another_host(tmp_path / LOCK, token="of the dead")
    said, began_s = [], time.monotonic()
    acquired(tmp_path, said).release()
    assert 0.1 < time.monotonic() - began_s < MOST_S
    assert len(said) == 1
    assert "waiting up to" in said[0]


@pytest.mark.parametrize("content", [b"", b"\x00" * 20, b"[]", b'{"host": 1'])
def test_a_lock_that_a_power_cut_has_damaged_is_taken_over_once_it_is_old(tmp_path, content):
    (tmp_path / LOCK).write_bytes(content)
    long_ago_s = time.time() - 1000
    os.utime(tmp_path / LOCK, (long_ago_s, long_ago_s))
    said = []
    acquired(tmp_path, said).release()
    assert not said


@pytest.mark.parametrize("damage", [{"pid": "abc"}, {"pid": None, "started": None}, {"pid": 0, "started": None}])
def test_a_lock_of_this_host_that_names_no_process_holds_nothing(tmp_path, damage):
    acquired(tmp_path)._is_released.set()
    lock = tmp_path / LOCK
    lock.write_text(json.dumps({**json.loads(lock.read_text()), "token": "of another", **damage}))
    acquired(tmp_path).release()


def test_a_clock_that_was_put_back_does_not_lengthen_the_wait_for_a_dead_holder(tmp_path):
    acquired(tmp_path)._is_released.set()
    move_to_another_host(tmp_path / LOCK, token="of the dead")
    tomorrow_s, began_s = time.time() + 86400, time.monotonic()
    os.utime(tmp_path / LOCK, (tomorrow_s, tomorrow_s))
    acquired(tmp_path).release()
    assert time.monotonic() - began_s < MOST_S


def test_of_many_that_find_a_dead_holder_one_takes_the_folder(tmp_path):
    acquired(tmp_path)._is_released.set()
    lock = tmp_path / LOCK
    lock.write_text(json.dumps({**json.loads(lock.read_text()), "started": "1", "token": "of the dead"}))
    outcomes = []

    def take():
        try:
            outcomes.append(acquired(tmp_path))
        except ConfigError:
            outcomes.append(None)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([claim for claim in outcomes if claim is not None and claim._is_ours()]) == 1


def test_a_run_that_seemed_dead_learns_that_its_folder_was_taken(tmp_path):
    first = acquired(tmp_path)
    first.check()
    move_to_another_host(tmp_path / LOCK, token="of the next")
    with pytest.raises(CheckpointError, match="taken over by another run"):
        first.check()
    first.release()
    assert (tmp_path / LOCK).exists()


def test_a_disk_that_does_not_answer_for_a_moment_ends_no_run(tmp_path, monkeypatch):
    def stale(lock):
        raise OSError(errno.ESTALE, "Stale file handle")

    claim = acquired(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_read", stale)
        claim.check()
    claim.release()


def test_a_lock_that_was_removed_is_made_again(tmp_path):
    claim = acquired(tmp_path)
    (tmp_path / LOCK).unlink()
    claim.check()
    assert (tmp_path / LOCK).exists()
    claim.release()


def test_a_folder_that_cannot_be_written_is_named_with_its_flag(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=f"--save {folder} cannot be written"):
            acquired(folder)


def test_a_full_disk_leaves_no_lock_behind_that_the_next_start_would_wait_for(tmp_path, monkeypatch):
    def full(value, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="No space left"):
        patch.setattr(module.json, "dump", full)
        acquired(tmp_path)
    assert list(tmp_path.iterdir()) == []
    acquired(tmp_path).release()


def test_without_a_folder_nothing_is_claimed():
    with claimed(None, Mesh(), Log()) as claim:
        assert claim is None


def test_who_takes_a_folder_removes_what_killed_writers_left_and_nothing_that_may_be_in_use(tmp_path):
    token = "0123456789abcdef" * 2
    of_holder = [f".unfinished-{name}-{token}" for name in (
        "metrics.jsonl", "config.toml", "config-12.toml", "trackers.json", "latest_checkpointed_iteration.txt")]
    of_others = [f".unfinished-loss.png-{token}", f".unfinished-report.html-{token}", f"{LOCK}-{token}"]
    not_ours = [".unfinished-metrics.jsonl", ".unfinished-notes", ".unfinished-metrics.jsonl-by-hand", "metrics.jsonl"]
    inside = tmp_path / "iter_0000002" / f".unfinished-validation.json-{token}"
    inside.parent.mkdir()
    (tmp_path / ".unfinished-iter_0000004").mkdir()
    for path in (inside, *(tmp_path / name for name in (*of_holder, *of_others, *not_ours))):
        path.write_text("half")

    def take():
        with claimed(str(tmp_path), Mesh(), Log()):
            return {path.name for path in tmp_path.iterdir()} - {LOCK}

    assert take() == {*of_others, *not_ours, "iter_0000002"} and not list(inside.parent.iterdir())
    for name in (*of_others, *not_ours):
        os.utime(tmp_path / name, (0, 0))
    assert take() == {*not_ours, "iter_0000002"}
