"""A flag that differs on resuming is honoured, reported or refused; a request to stop is answered at any time."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.summary.writer.record_writer import RecordWriter

from megatron.checkpoint import sharded
from megatron.checkpoint.claim import Claim
from megatron.checkpoint.metrics import read_records
from megatron.checkpoint.saving import Saver
from megatron.checkpoint.store import open_place, read_state
from megatron.config import CheckpointConfig, LoggingConfig
from megatron.data.corpus.indexed import open_indexed
from megatron.data.corpus.vocab import DEFAULT_VOCAB, Vocab
from megatron.infer.pretrained import load_pretrained
from megatron.log import Log
from megatron.train import evaluations
from megatron.train.loop import Training
from megatron.train.observation.events import Events, TrainingFacts
from megatron.train.setup import run as build_module
from megatron.train.step.meters import Reading, Totals
from megatron.train.step.train_step import TrainStep
from pretrain_tape import main
from tests.golden.training import TINY, edit_state, losses, run_on_ranks, start_program
from tests.indexed_files import write_indexed

SHORT = [*TINY, "--num-layers", "1", "--eval-interval", "100", "--log-interval", "2"]


class Runs:
    """The program in this process, on one folder; `lines` has what it said last."""

    def __init__(self, corpus, folder, capsys):
        self.corpus, self.folder, self.capsys = corpus, folder, capsys

    def __call__(self, *flags, status=0):
        places = ["--data-path", self.corpus, "--save", self.folder, "--load", self.folder]
        assert main([*map(str, [*SHORT, *places, *flags])]) == status
        output = self.capsys.readouterr()
        self.lines = (output.out + output.err).splitlines()
        return self

    def notes(self):
        return [line for line in self.lines if line.startswith("note: ")]

    def error(self, *flags, status=2):
        [line] = [line for line in self(*flags, status=status).lines if line.startswith("error: ")]
        return line


@pytest.fixture
def run(corpus, tmp_path, capsys):
    return Runs(corpus, tmp_path / "run", capsys)


@pytest.fixture
def begun(run):
    """A run that stands at iteration 4 of 8."""
    return run("--train-iters", 8, "--exit-interval", 4)


def consumed(folder):
    return read_records(folder / "metrics.jsonl")[-1]["consumed_samples"]


@pytest.mark.parametrize(("before", "after", "end"), [(2, 8, 40), (8, 2, 40)])
def test_a_run_in_samples_ends_there_after_another_global_batch(run, before, after, end):
    flags = ["--train-samples", 40, "--seq-length", 64, "--global-batch-size"]
    run(*flags, before, "--exit-interval", 16 // before)
    run(*flags, after)
    assert consumed(run.folder) == end
    assert run.notes() == [f"note: --global-batch-size is {after}, it was {before} before: it applies from here on"]
    assert "training is complete" in "".join(run(*flags, after).lines)


def test_a_run_in_iterations_says_where_it_ends_after_another_global_batch(begun):
    said = begun.error("--train-iters", 8, "--global-batch-size", 4)
    assert "(--global-batch-size is 4, it was 2: as many iterations are then another course)" in said
    assert "--override-lr-scheduler" in said
    begun("--train-iters", 8, "--global-batch-size", 4, "--use-checkpoint-lr-scheduler")
    assert begun.notes()[2:] == [
        "note: --train-iters 8 now ends after 24 samples, and the course of the learning rate after 16"]
    assert list(losses(begun.folder)) == [2, 4, 6, 8]


def test_what_holds_from_here_on_is_said_a_line_each(begun):
    begun("--train-iters", 8, "--clip-grad", 0.5, "--adam-beta2", 0.9, "--bf16", "--hidden-dropout", 0.1,
          "--checkpoint-activations", "--eval-iters", 1)
    assert sorted(line.split()[1] for line in begun.notes()) == ["--adam-beta2", "--bf16", "--clip-grad",
                                                                 "--hidden-dropout"]
    assert num_judged(begun) == 4  # with those behind it steps of another course cannot be compared


def test_another_micro_batch_is_said_where_there_is_dropout(run):
    flags = ["--train-iters", 4, "--global-batch-size", 4, "--hidden-dropout", 0.1, "--micro-batch-size"]
    run(*flags, 2, "--exit-interval", 2)
    run(*flags, 4)
    assert run.notes() == ["note: --micro-batch-size is 4, it was 2 before: dropout masks differ"]


def test_nothing_is_said_of_a_run_that_goes_on_as_it_was(begun):
    assert begun("--train-iters", 8).notes() == []
    assert num_judged(begun) == 8


def num_judged(run):
    """With how many steps the next one would be compared at iteration 8."""
    return read_state(run.folder / "iter_0000008" / "state.json")["guards"]["judge"]["num_steps"]


@pytest.mark.parametrize("how", [["--finetune"], [], ["--no-load-optim"]])
def test_a_command_that_takes_up_another_run_goes_on_with_its_own_once_that_has_saved(begun, tmp_path, how):
    other, ends = begun.folder, {}
    command = ["--load", other, *how, "--train-iters", 8]
    for begun.folder, stops in ((tmp_path / "unbroken", []), (tmp_path / "new", [["--exit-interval", 6], []])):
        for stop in (*stops, []):
            begun(*command, *stop)
        ends[begun.folder] = weights(begun.folder, 8)
    assert any("holds a run that took up --load" in line for line in begun.notes())
    assert "training is complete" in "".join(begun.lines)
    unbroken, new = ends.values()
    assert all(torch.equal(tensor.read(), unbroken[name].read()) for name, tensor in new.items())
    assert "already holds a run" in begun.error("--load", tmp_path / "unbroken", "--finetune", "--train-iters", 8)
    other.rename(tmp_path / "moved")
    begun(*command)
    assert "training is complete" in "".join(begun.lines)


def test_a_kept_course_of_another_peak_leaves_single_groups_their_own(run):
    flags = ["--optimizer", "muon", "--muon-lr", 0.01, "--lr-decay-style", "constant", "--lr-warmup-fraction", 0,
             "--train-iters", 4]
    run(*flags, "--lr", 1e-3, "--exit-interval", 2)
    run(*flags, "--lr", 1e-4, "--use-checkpoint-lr-scheduler")
    assert losses(run.folder, name="learning_rate") == {2: 1e-3, 4: 1e-3}
    assert losses(run.folder, name="learning_rate_matrix") == pytest.approx({2: 0.01, 4: 0.01})


def test_a_checkpoint_that_names_neither_its_batch_nor_its_data_is_not_said_to_have_had_others(begun, monkeypatch):
    place = begun.folder / "iter_0000004"
    state = read_state(place / "state.json")
    state["config"]["global_batch_size"] = None
    del state["data"], state["vocabulary"]
    (place / "state.json").write_text(json.dumps(state))
    edit_state(place)
    monkeypatch.chdir(Path(begun.corpus).parent)
    begun.corpus = "corpus"
    assert begun("--train-iters", 8, "--exit-interval", 5).notes() == []
    begun("--train-iters", 8, "--global-batch-size", 4, "--override-lr-scheduler")
    assert begun.notes()[0] == "note: --global-batch-size is 4, it was 2 before: it applies from here on"


def test_a_run_that_is_past_the_end_of_its_flags_says_so(begun):
    [line] = [line for line in begun("--train-iters", 3, "--override-lr-scheduler").lines if "complete" in line]
    assert line == "training is complete at iteration 4: 4 are done, and --train-iters is 3"


def test_data_that_were_moved_are_the_same_and_others_in_their_place_are_not(begun, tmp_path):
    for ending in (".bin", ".idx"):
        shutil.copy(begun.corpus + ending, tmp_path / f"moved{ending}")
    begun.corpus = str(tmp_path / "moved")
    assert begun("--train-iters", 8, "--exit-interval", 5).notes() == []
    data = open_indexed(begun.corpus)
    write_indexed(Path(begun.corpus), [np.array(data[index][::-1]) for index in range(len(data))])
    [note] = begun("--train-iters", 8, "--exit-interval", 6).notes()
    assert note == "note: the files behind --data-path are not those of before: later samples differ"
    [note] = begun("--train-iters", 8, "--split", "80,10,10", "--exit-interval", 7).notes()
    assert note == "note: --split is 80,10,10, it was 90,7,3 before: later samples differ"


def test_other_clusters_in_the_same_file_are_said(run, tmp_path):
    clusters = tmp_path / "clusters.tsv"
    flags = ["--train-iters", 8, "--blend-by", "cluster", "--cluster-file", clusters, "--exit-interval"]
    clusters.write_text("0\t0\n0\t1\n")
    run(*flags, 4)
    assert run(*flags, 5).notes() == []
    clusters.write_text("0\t0\n0\t2\n")
    assert run(*flags, 6).notes() == [
        "note: the clusters of --cluster-file are not those of before: later samples differ"]


def test_state_of_another_optimizer_is_refused_or_left(begun):
    assert "give --optimizer adam, or --no-load-optim" in begun.error("--train-iters", 8, "--optimizer", "sgd")
    begun("--train-iters", 8, "--optimizer", "sgd", "--no-load-optim")


def test_an_optimizer_is_started_afresh_once_whatever_stops_the_run(begun, tmp_path):
    ends, command = [], ["--train-iters", 8, "--no-load-optim"]
    for name in ("at once", "stopped"):
        shutil.copytree(tmp_path / "run", tmp_path / name)
    for begun.folder, stops in ((tmp_path / "at once", []), (tmp_path / "stopped", ["--exit-interval", 6])):
        assert begun(*command, *stops).notes() == ["note: --no-load-optim: the optimizer starts afresh"]
        if stops:
            assert begun(*command).notes() == ["note: --no-load-optim held when this run began: its optimizer goes on"]
        ends.append(weights(begun.folder, 8))
    assert all(torch.equal(tensor.read(), ends[1][name].read()) for name, tensor in ends[0].items())
    another = ["--optimizer", "sgd", "--exit-interval", 10]
    assert "note: --no-load-optim: the optimizer starts afresh" in begun(*command, *another).notes()


def test_another_vocabulary_is_refused_and_a_copy_is_not(begun, tmp_path):
    tokens = DEFAULT_VOCAB.read_text().split()
    copy, swapped = tmp_path / "copy.txt", tmp_path / "swapped.txt"
    copy.write_text("\n".join(tokens))
    swapped.write_text("\n".join([*tokens[:-2], tokens[-1], tokens[-2]]))
    assert f"--vocab-file is {swapped}" in begun.error("--train-iters", 8, "--vocab-file", swapped)
    begun("--train-iters", 8, "--vocab-file", copy, "--exit-interval", 6)
    swapped.replace(copy)
    assert "put it back as it was" in begun.error("--train-iters", 8, "--vocab-file", copy)


def test_the_vocabulary_and_the_ends_of_a_run_stay_its_own(run, tmp_path):
    tokens = Vocab.from_file("esm").tokens
    first, moved = tmp_path / "first.txt", tmp_path / "moved.txt"
    first.write_text("\n".join(tokens).replace("<mask>", "#"))
    run("--train-iters", 2, "--vocab-file", first, "--mask-token", "#", "--protein-ends", "both")
    [line] = [line for line in run("--train-iters", 4, "--override-lr-scheduler").lines if "taken from" in line]
    assert all(flag in line for flag in (f"--vocab-file {first}", "--mask-token #", "--protein-ends both"))
    assert "--protein-ends is start, but the checkpoint was trained with both" in run.error(
        "--train-iters", 6, "--protein-ends", "start")
    assert f"it was trained with {first} with --mask-token #" in run.error(
        "--train-iters", 6, "--vocab-file", "esm", "--mask-token", "<mask>")
    first.rename(moved)
    run("--train-iters", 6, "--override-lr-scheduler", "--vocab-file", moved)
    assert list(losses(run.folder)) == [2, 4, 6]
    moved.rename(tmp_path / "gone.txt")
    assert f"it was trained with {moved} with --mask-token #" in run.error("--train-iters", 8)


def test_a_vocabulary_named_from_one_folder_is_found_from_another(run, tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text(DEFAULT_VOCAB.read_text() + "[extra]\n")
    monkeypatch.chdir(tmp_path)
    run("--train-iters", 2, "--vocab-file", "mine.txt")
    monkeypatch.chdir("/")
    run("--train-iters", 4, "--override-lr-scheduler")
    assert load_pretrained(str(run.folder)).vocab.tokens[-1] == "[extra]"


def test_a_state_that_says_nothing_of_its_ends_has_cls_alone(begun):
    place = begun.folder / "iter_0000004"
    config = read_state(place / "state.json")["config"]
    del config["protein_ends"]
    edit_state(place, config=config)
    assert "the checkpoint was trained with start" in begun.error("--train-iters", 8, "--protein-ends", "both")


def test_a_family_that_a_checkpoint_names_is_its_vocabulary(begun):
    place = begun.folder / "iter_0000004"
    state = read_state(place / "state.json")
    del state["vocabulary"]
    (place / "state.json").write_text(json.dumps(state | {"config": state["config"] | {"vocab_file": "esm"}}))
    edit_state(place)
    assert "it was trained with esm" in begun.error("--train-iters", 8, "--vocab-file", "iupac")


def test_a_state_that_is_not_a_runs_is_named(begun):
    place = begun.folder / "iter_0000004"
    whole = read_state(place / "state.json")
    for damage in ({"progress": None}, {"progress": {"iteration": 4}}, {"config": []}, {"loss_scale": {}},
                   {"progress": {"iteration": 5, "consumed_samples": 8}}, {"schedule": 3},
                   {"schedule": {}}, {"schedule": whole["schedule"] | {"decay_samples": "16"}}, {"loss_scale": [1.0]},
                   {"progress": {"iteration": 4, "consumed_samples": 10**30}}, {"loss_scale": ["1", 2, 3]}):
        edit_state(place, **(whole | damage))
        assert str(place) in begun.error("--train-iters", 8), damage


def test_after_going_back_nothing_of_the_abandoned_course_is_left_in_the_way(run):
    run("--train-iters", 12, "--save-interval", 4)
    (run.folder / "latest_checkpointed_iteration.txt").write_text("8")
    run("--train-iters", 12, "--save-interval", 1, "--keep-checkpoints", 1, "--exit-interval", 10)
    assert [line for line in run.notes() if "abandoned-1-iter_0000012" in line]
    assert sorted(path.name for path in run.folder.glob("iter_*")) == ["iter_0000008", "iter_0000010"]
    assert max(record["iteration"] for record in read_records(run.folder / "metrics.jsonl")) == 10
    run("--train-iters", 12, "--save-interval", 1, "--keep-checkpoints", 1)
    assert sorted(path.name for path in run.folder.glob("*iter_*")) == [
        "abandoned-1-iter_0000012", "iter_0000010", "iter_0000012"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [2, 4, 6, 8, 10, 12]


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


def test_a_run_that_is_complete_evaluates_again_and_names_no_checkpoint_that_is_not_there(begun, tmp_path):
    begun("--train-iters", 4, "--override-lr-scheduler", "--save", tmp_path / "new")
    assert "training is complete at iteration 4" in begun.lines
    assert [line for line in begun.lines if "test loss" in line]
    assert not [line for line in begun.lines if "iter_0000004" in line]


# --- the course of the learning rate ---

WSD = ["--lr-decay-style", "WSD", "--lr-wsd-decay-iters", 2, "--lr-warmup-fraction", 0, "--lr-warmup-iters", 1,
       "--save-interval", 4]


def weights(folder, iteration):
    return open_place(folder / f"iter_{iteration:07d}").model


def test_a_run_is_prolonged_from_before_its_decay_to_what_a_longer_one_is(run, tmp_path):
    run(*WSD, "--train-iters", 6)
    within = run.error(*WSD, "--train-iters", 10)
    assert "iter_0000006 is inside the decay of the learning rate, which began after 8 samples and is now to begin "\
        "after 16; go on from a checkpoint before it" in within
    (run.folder / "latest_checkpointed_iteration.txt").write_text("4")
    run(*WSD, "--train-iters", 10)
    assert ("note: the learning rate schedule ends after 20 samples, before it was 12: for the 8 consumed so far the "
            "two are the same") in run.notes()
    prolonged, run.folder = run.folder, tmp_path / "long"
    run(*WSD, "--train-iters", 10)
    for kind in ("loss", "learning_rate"):
        assert losses(prolonged, name=kind) == losses(run.folder, name=kind)
    longer = weights(run.folder, 10)
    assert all(torch.equal(tensor.read(), longer[name].read()) for name, tensor in weights(prolonged, 10).items())
    assert losses(run.folder, name="learning_rate")[10] < losses(run.folder, name="learning_rate")[8] == 2e-3


def test_a_warm_up_that_grows_with_the_run_is_another_course(run):
    run(*WSD[:-6], "--train-iters", 6, "--exit-interval", 2)
    assert "(--lr-warmup-fraction 0.1 is of the decay, and so of --train-iters; --lr-warmup-iters or " in run.error(
        *WSD[:-6], "--train-iters", 10)


def test_a_run_that_is_longer_than_the_course_of_its_checkpoint_says_so(begun):
    begun("--train-iters", 12, "--use-checkpoint-lr-scheduler", "--exit-interval", 5)
    assert [note for note in begun.notes() if "decayed after 16 samples, and the run ends after 24: all between are "
            "trained at --min-lr 0.0001; --override-lr-scheduler takes the flags' course in its place" in note]


def test_sgd_without_momentum_keeps_nothing_and_goes_on_all_the_same(run, tmp_path):
    flags = ["--optimizer", "sgd", "--sgd-momentum", 0, "--train-iters", 8]
    run(*flags, "--exit-interval", 4)
    run(*flags)
    stopped, run.folder = run.folder, tmp_path / "unbroken"
    run(*flags)
    unbroken = weights(run.folder, 8)
    assert all(torch.equal(tensor.read(), unbroken[name].read()) for name, tensor in weights(stopped, 8).items())


COURSES = ["--weight-decay-incr-style", "cosine", "--start-weight-decay", 0, "--end-weight-decay", 9,
           "--cautious-weight-decay"]


@pytest.mark.parametrize("optimizer", ["adam", "normuon"])
def test_a_run_with_a_course_of_cautious_weight_decay_goes_on_as_if_it_had_not_stopped(run, tmp_path, optimizer):
    flags = [*COURSES, "--optimizer", optimizer, "--train-iters", 8]
    run(*flags, "--exit-interval", 4)
    run(*flags)
    assert run.notes() == []
    stopped, run.folder = run.folder, tmp_path / "unbroken"
    run(*flags)
    unbroken = weights(run.folder, 8)
    assert all(torch.equal(tensor.read(), unbroken[name].read()) for name, tensor in weights(stopped, 8).items())
    decays = losses(run.folder, name="weight_decay")
    assert decays == losses(stopped, name="weight_decay") and 0 < decays[2] < decays[8] < 9
    assert "--weight-decay-incr-style is constant, in " in run.error(
        "--optimizer", optimizer, "--train-iters", 8, "--use-checkpoint-lr-scheduler")
    assert "end weight decay of the learning-rate schedule is 8.0, in the checkpoint 9.0" in run.error(
        *flags, "--end-weight-decay", 8)
    assert ("weight decay incr samples of the learning-rate schedule is 24, in the checkpoint 16 (--weight-decay-incr-"
            "style is a course over the whole run, which so cannot be prolonged)") in run.error(
                *flags, "--lr-decay-iters", 8, "--train-iters", 12)


# --- one folder ---


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


# --- what cannot be written ---


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


# --- when to save, and what stays ---


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


# --- a request to stop ---


def signalled_in(monkeypatch, module, name):
    """Sends SIGTERM to this process at the first call of a function of the program."""
    original, calls = getattr(module, name), []

    def wrapper(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, wrapper)


def test_a_request_while_the_data_are_built_ends_before_the_first_step(run, monkeypatch):
    signalled_in(monkeypatch, build_module, "build_datasets")
    run("--train-iters", 8)
    assert "stopped before the first step: there is nothing to save" in run.lines
    assert not list(run.folder.glob("iter_*"))
    assert run("--train-iters", 8).lines
    assert list(losses(run.folder)) == [2, 4, 6, 8]


def test_a_request_on_going_on_saves_nothing_anew(begun, monkeypatch):
    signalled_in(monkeypatch, build_module, "build_datasets")
    written_ns = (begun.folder / "iter_0000004" / "state.json").stat().st_mtime_ns
    begun("--train-iters", 8)
    assert "stopped at iteration 4 before another step: there is nothing new to save" in begun.lines
    assert (begun.folder / "iter_0000004" / "state.json").stat().st_mtime_ns == written_ns


@pytest.mark.parametrize("flags", [[], ["--async-save"]])
@pytest.mark.parametrize(("where", "name"), [(evaluations, "evaluate"), (Saver, "save")])
def test_a_request_during_evaluation_or_saving_ends_the_run_there(run, monkeypatch, where, name, flags):
    signalled_in(monkeypatch, where, name)
    run("--train-iters", 8, "--eval-interval", 2, "--save-interval", 2, *flags)
    assert [line for line in run.lines if line.startswith("stopped at iteration 2; saved in")]
    assert sorted(path.name for path in run.folder.glob("iter_*")) == ["iter_0000002"]
    run("--train-iters", 4, "--eval-interval", 2, "--override-lr-scheduler", *flags)
    assert list(losses(run.folder, "valid")) == [2, 4]


def test_an_evaluation_before_which_the_run_was_stopped_is_made_up(run, monkeypatch, tmp_path):
    flags = ["--train-iters", 6, "--eval-interval", 2]
    signalled_in(monkeypatch, TrainStep, "__call__")  # heard in the next
    run(*flags)
    assert losses(run.folder, "valid") == {}
    run(*flags)
    stopped, run.folder = run.folder, tmp_path / "unbroken"
    run(*flags)
    assert losses(stopped, "valid") == losses(run.folder, "valid") and list(losses(stopped, "valid")) == [2, 4, 6]
    assert losses(stopped) == losses(run.folder)
    assert (stopped / "iter_0000002" / "validation.json").exists()


def test_a_request_after_the_last_step_leaves_the_evaluation_for_later(run, monkeypatch):
    signalled_in(monkeypatch, evaluations, "evaluate")
    run("--train-iters", 4)
    assert "stopped before the evaluation was done: the same command does it" in run.lines
    run("--train-iters", 4)
    assert "training is complete at iteration 4" in run.lines
    assert losses(run.folder, "test")


def test_a_request_after_the_last_evaluation_leaves_nothing_for_later(run, monkeypatch):
    def evaluate(*args, label, **kwargs):
        result = evaluated(*args, label=label, **kwargs)
        if label == "test":
            signal.raise_signal(signal.SIGTERM)
        return result

    evaluated = evaluations.evaluate
    monkeypatch.setattr(evaluations, "evaluate", evaluate)
    run("--train-iters", 4)
    assert [line for line in run.lines if line.startswith("  test loss")] and (run.folder / "loss.png").exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_a_request_while_the_program_loads_is_answered(run):
    process = start_program(sys.executable, *SHORT, "--train-iters", 8, "--data-path", run.corpus)
    bit, caught = 1 << (signal.SIGTERM - 1), 0
    while not caught & bit:
        assert process.poll() is None, process.communicate()[0]
        caught = int(Path(f"/proc/{process.pid}/status").read_text().split("SigCgt:")[1].split()[0], 16)
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert output == "stopped: there is nothing to save\n"
