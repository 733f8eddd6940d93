"""A run begins, saves and reports only in folders that it may use, and loses nothing where a disk refuses."""

import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.summary.writer.record_writer import RecordWriter

from megatron.checkpoint import sharded
from megatron.checkpoint.claim import Claim
from megatron.checkpoint.metrics import read_records
from megatron.config import CheckpointConfig, LoggingConfig
from megatron.log import Log
from megatron.train.loop import Training
from megatron.train.observation.events import Events, TrainingFacts
from megatron.train.step.meters import Reading, Totals
from tests.golden.training import SHORT, losses, run_on_ranks


def test_nothing_to_load_is_no_fresh_start(begun, corpus, tmp_path):
    places = {"a path that is not there": ["--load", tmp_path / "no", "--save", tmp_path / "new"],
              "an iter_ folder": ["--load", begun.folder / "iter_0000004", "--save", tmp_path / "new"],
              "no weights": ["--finetune", "--load", tmp_path / "no", "--save", tmp_path / "no"],
              "no folder": ["--finetune", "--load", tmp_path / "no", "--save", tmp_path / "new"]}
    for why, flags in places.items():
        assert begun.error("--train-iters", 8, *flags), why
    assert not (tmp_path / "new" / "iter_0000008").exists()
    (begun.folder / "latest_checkpointed_iteration.txt").unlink()
    begun("--train-iters", 8)
    assert f"going on from iteration 4 in {begun.folder}" in begun.lines


def test_a_folder_of_something_else_is_no_new_run_and_one_that_never_saved_is(run, corpus):
    (run.folder / "photographs").mkdir(parents=True)
    assert "holds photographs but no checkpoint" in run.error("--train-iters", 2)
    (run.folder / "photographs").rmdir()
    (run.folder / "slurm-12.out").touch()
    run("--train-iters", 2)
    for name in ("latest_checkpointed_iteration.txt", "best"):
        (run.folder / name).unlink()
    shutil.rmtree(run.folder / "iter_0000002")  # as if it had been killed before it saved
    run("--train-iters", 2, "--tensorboard-dir", run.folder / "board")
    assert list(losses(run.folder)) == [2]


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew_over_what_is_left_of_it(begun):
    held, metrics = f"--save {begun.folder} held a run, whose checkpoints are gone", begun.folder / "metrics.jsonl"
    before = metrics.read_bytes()
    (begun.folder / "iter_0000004").rename(begun.folder.parent / "elsewhere")
    lost = f"{held} (latest_checkpointed_iteration.txt names iteration 4); copy them back, or give another --save"
    assert lost in begun.error("--train-iters", 8)
    (begun.folder / "latest_checkpointed_iteration.txt").unlink()
    (begun.folder / "best").symlink_to("iter_0000004")
    assert f"{held} (best names iter_0000004); copy them back" in begun.error("--train-iters", 8)
    assert metrics.read_bytes() == before
    (begun.folder.parent / "elsewhere").rename(begun.folder / "iter_0000004")
    begun("--train-iters", 8)
    assert f"going on from iteration 4 in {begun.folder}" in begun.lines


def test_a_folder_in_use_is_refused_by_all_ranks(run):
    claim = Claim(run.folder)
    claim.acquire(print)
    try:
        assert f"--save {run.folder} is in use by process {os.getpid()}" in run.error("--train-iters", 2)
        statuses = run_on_ranks(*SHORT, "--train-iters", 2, "--data-path", run.corpus, "--save", run.folder, ranks=2)
        assert statuses[0] == 2
        assert statuses[1]  # it has ended
    finally:
        claim.release()
    run("--train-iters", 2)
    assert not (run.folder / ".lock").exists()


def test_folders_that_cannot_be_written_are_named_with_their_flag_before_training(run, tmp_path):
    (tmp_path / "file").touch()
    assert "--save" in run.error("--train-iters", 2, "--save", tmp_path / "file", "--load", tmp_path / "file")
    assert "--tensorboard-dir" in run.error("--train-iters", 2, "--tensorboard-dir", tmp_path / "file")
    assert not (run.folder / "latest_checkpointed_iteration.txt").exists()
    run.folder.joinpath("metrics.jsonl").unlink()
    run.folder.joinpath("metrics.jsonl").mkdir()
    assert "metrics.jsonl cannot be written" in run.error("--train-iters", 2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("place", ["metrics", "board"])
def test_a_disk_that_is_full_while_metrics_are_written_is_one_line_and_ends_nothing(tmp_path, capfd, place):
    events = Events(CheckpointConfig(save=str(tmp_path)), LoggingConfig(), Log(), 0)
    reading = Reading(1, 1, 2.5, 0.1, 1.0, 0, 10, 10, 1.0, 1.0, [])
    assert events._metrics is not None
    metrics = events._metrics.path
    with Path("/dev/full").open("wb") as full:
        if place == "metrics":
            events._metrics.path = Path("/dev/full")
        else:
            events._board._file, events._board._records = full, RecordWriter(full)
        for iteration in (1, 2, 3):
            if iteration == 3:
                events._metrics.path = metrics  # there is room again
            events.train(reading, TrainingFacts(iteration, 3, 2, Totals(), learning_rate=1.0, group_rates={},
                                                global_batch_size=2, loss_scale=1.0, peak_flops=1.0))
        events.close()
    output = "".join(capfd.readouterr())
    assert "Traceback" not in output
    assert output.count("No space left on device") == 1
    assert [record["iteration"] for record in read_records(metrics)] == [1, 2, 3]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_saves_by_the_clock_where_told(corpus, tmp_path, ranks):
    flags = [*SHORT, "--train-iters", 6, "--save-interval", 100, "--save-interval-minutes", 1e-6, "--data-path", corpus,
             "--global-batch-size", 4, "--save", tmp_path]
    assert run_on_ranks(*flags, ranks=ranks) == [0] * ranks
    # With several ranks a step is agreed on by the next.
    assert [int(path.name[5:]) for path in sorted(tmp_path.glob("iter_*"))] == list(range(ranks, 7))


def test_the_clock_asks_once_for_a_checkpoint_that_comes_a_step_later():
    run = SimpleNamespace(config=SimpleNamespace(checkpoint=CheckpointConfig(save_interval_minutes=1.0)),
                          mesh=SimpleNamespace(world=SimpleNamespace(rank=0)))
    training = SimpleNamespace(_run=run, _saved_at_s=time.monotonic() - 61)
    assert [Training._is_time_to_save(training) for _ in range(2)] == [True, False]


def test_the_best_of_a_run_is_linked_to(run):
    run("--train-iters", 8, "--save-interval", 2, "--eval-interval", 4, "--keep-checkpoints", 1)
    found = {number: losses(run.folder, "valid")[number] for number in (4, 8)}
    assert os.readlink(run.folder / "best") == f"iter_{min(found, key=found.get):07d}"


@pytest.mark.parametrize("flags", [[], ["--async-save"]])
def test_permission_that_is_lost_is_said_and_nothing_is_lost(begun, monkeypatch, flags):
    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(sharded, "begin_folder", refused)
    line = begun.error("--train-iters", 8, "--save-interval", 2, *flags, status=4)
    assert f"could not save {begun.folder}/iter_0000008: Permission denied" in line
    monkeypatch.undo()
    begun("--train-iters", 8, "--exit-interval", 6)
    assert f"going on from iteration 4 in {begun.folder}" in begun.lines
