"""Flags, data and state that differ on resuming are honoured, reported or refused."""

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from megatron.checkpoint.convert.formats import FORMATS
from megatron.checkpoint.metrics import read_records
from megatron.checkpoint.store import read_state
from megatron.data.corpus.indexed import open_indexed
from megatron.train import rewinding
from tests.golden.training import edit_state, losses, weights
from tests.indexed_files import write_indexed


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
    assert "(--global-batch-size is 4, it was 2: as many iterations are then another schedule)" in said
    assert "--override-lr-scheduler" in said
    begun("--train-iters", 8, "--global-batch-size", 4, "--use-checkpoint-lr-scheduler")
    assert begun.notes()[2:] == [
        "note: --train-iters 8 now ends after 24 samples, and the learning-rate schedule after 16"]
    assert list(losses(begun.folder)) == [2, 4, 6, 8]


def test_what_holds_from_here_on_is_said_a_line_each(begun):
    begun("--train-iters", 8, "--clip-grad", 0.5, "--adam-beta2", 0.9, "--bf16", "--hidden-dropout", 0.1,
          "--checkpoint-activations", "--eval-iters", 1)
    assert sorted(line.split()[1] for line in begun.notes()) == ["--adam-beta2", "--bf16", "--clip-grad",
                                                                 "--hidden-dropout"]
    assert num_judged(begun) == 4  # with those behind it steps of another continuation cannot be compared


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


def test_a_kept_schedule_of_another_peak_leaves_single_groups_their_own_and_flags_as_they_are(run, monkeypatch):
    train = Mock(wraps=rewinding.train)
    monkeypatch.setattr(rewinding, "train", train)
    flags = ["--optimizer", "muon", "--muon-lr", 0.01, "--lr-decay-style", "constant", "--lr-warmup-fraction", 0,
             "--train-iters", 4]
    run(*flags, "--lr", 1e-3, "--exit-interval", 2)
    run(*flags, "--lr", 1e-4, "--use-checkpoint-lr-scheduler")
    assert losses(run.folder, name="learning_rate") == {2: 1e-3, 4: 1e-3}
    assert losses(run.folder, name="learning_rate_matrix") == pytest.approx({2: 0.01, 4: 0.01})
    resumed = train.call_args.args[0]
    assert resumed.engine.config == resumed.config and resumed.config.schedule.lr == 1e-4


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


def test_a_state_that_is_not_a_runs_is_named(begun, tmp_path):
    place = FORMATS["whole"].write(FORMATS["sharded"].read(begun.folder), tmp_path / "whole")  # without checksums
    whole, flags = read_state(place / "state.json"), ["--load", tmp_path / "whole", "--train-iters", 8, "--save"]
    begun(*flags, tmp_path / "undamaged")
    for damage in ({"progress": None}, {"progress": {"iteration": 4}}, {"config": []}, {"loss_scale": {}},
                   {"progress": {"iteration": 5, "consumed_samples": 8}}, {"schedule": 3},
                   {"schedule": {}}, {"schedule": whole["schedule"] | {"decay_samples": "16"}}, {"loss_scale": [1.0]},
                   {"progress": {"iteration": 4, "consumed_samples": 10**30}}, {"loss_scale": ["1", 2, 3]},
                   {"guards": 3}, {"guards": whole["guards"] | {"num_rewinds": None}},
                   {"guards": whole["guards"] | {"left_out": [[1]]}}):
        (place / "state.json").write_text(json.dumps(whole | damage))
        assert str(place) in begun.error(*flags, tmp_path / "new"), damage


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


def test_a_run_that_is_complete_evaluates_again_and_names_no_checkpoint_that_is_not_there(begun, tmp_path):
    begun("--train-iters", 4, "--override-lr-scheduler", "--save", tmp_path / "new")
    assert "training is complete at iteration 4" in begun.lines
    assert [line for line in begun.lines if "test loss" in line]
    assert not [line for line in begun.lines if "iter_0000004" in line]


def test_one_number_for_the_share_of_masks_is_read_as_the_list_that_the_flag_is(tmp_path):
    (tmp_path / "state.json").write_text(json.dumps({"config": {"mask_prob": 0.15}}))
    assert read_state(tmp_path / "state.json") == {"config": {"mask_prob": [0.15]}}
