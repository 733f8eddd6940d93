"""Steps that go wrong are reported with their proteins and skipped, or the run goes back and leaves their rows out."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron.checkpoint.store import open_place, read_state
from megatron.config import CheckpointConfig, Config, GuardsConfig
from megatron.errors import DivergedError
from megatron.log import Log
from megatron.parallel.mesh import Mesh
from megatron.train import rewinding
from megatron.train.guards.guard import RewindError, WrongSteps
from megatron.train.state import TrainState
from pretrain_tape import main
from tests.golden.training import TINY, losses, run_on_ranks

FLAGS = [*TINY, "--num-layers", "1", "--eval-interval", "100", "--log-interval", "2", "--train-iters", "10",
         "--save-interval", "4"]


@pytest.fixture
def run(corpus, tmp_path, capsys):
    def run(name, *flags, status=0):
        folder = tmp_path / name
        places = ["--data-path", corpus, "--save", folder, "--load", folder]
        assert main([*map(str, [*FLAGS, *places, *flags])]) == status
        output = capsys.readouterr()
        return folder, (output.out + output.err).splitlines()

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.read() for name, tensor in open_place(folder / "iter_0000010").model.items()}


def assert_same(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def suspects(folder: Path, step: int) -> list[list[str]]:
    text = (folder / "spikes" / f"step_{step:07d}.tsv").read_text()
    return [line.split("\t") for line in text.splitlines()]


def test_a_run_that_goes_back_ends_as_one_that_was_told_to_leave_the_rows_out(run):
    folder, lines = run("back", "--inject-fault", "nan@7", "--on-spike", "rewind")
    assert sum(line.startswith("note: step 7 went wrong") for line in lines) == 2
    assert any(line.startswith("steps 7 to 8 went wrong twice") and "1 of 3 times" in line for line in lines)
    state = read_state(folder / "iter_0000010" / "state.json")
    assert state["guards"]["left_out"] == [[12, 16]]
    told, _ = run("told", "--leave-out-samples", "12-16")
    assert_same(folder, told)
    plain, _ = run("plain")
    assert any(not torch.equal(tensor, weights(plain)[name]) for name, tensor in weights(folder).items())
    header, *rows = suspects(folder, 7)
    assert header == ["row", "corpus", "document", "name", "residues"]
    assert {row[0] for row in rows} == {"12", "13", "14", "15"}


def test_a_disk_that_refuses_the_names_of_the_proteins_stops_no_run(run, monkeypatch):
    def refused(path, text):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("megatron.train.guards.suspects.write_text", refused)
    _, lines = run("full", "--inject-fault", "nan@7", "--on-spike", "rewind")
    assert any(line.startswith("steps 7 to 8 went wrong twice") and "(No space left on device); going back" in line
               for line in lines)


def test_a_step_that_comes_out_normal_again_is_a_faulty_device_and_costs_no_rows(run):
    folder, lines = run("flip", "--inject-fault", "flip@7", "--on-spike", "rewind")
    assert sum(line.startswith("note: step 7 came out normal this time") for line in lines) == 1
    assert_same(folder, run("plain")[0])


def test_a_run_of_which_nothing_was_saved_goes_back_to_its_beginning(run):
    folder, _ = run("back", "--inject-fault", "nan@3", "--on-spike", "rewind")
    assert_same(folder, run("told", "--leave-out-samples", "4-8")[0])


def test_a_run_that_left_its_optimizer_leaves_it_on_each_way_back_before_it_has_saved(run, tmp_path):
    begun, _ = run("back", "--exit-interval", "4")
    shutil.copytree(begun, tmp_path / "told")
    afresh = ["--no-load-optim", "--optimizer", "sgd"]
    folder, lines = run("back", *afresh, "--inject-fault", "nan@7", "--on-spike", "rewind")
    assert any("going back" in line and "1 of 3 times" in line for line in lines)
    assert_same(folder, run("told", *afresh, "--leave-out-samples", "12-16")[0])


def test_two_ranks_go_back_together(run, corpus, tmp_path):
    folder = tmp_path / "ranks"
    places = ["--data-path", corpus, "--save", folder, "--load", folder, "--micro-batch-size", 1]
    faults = ["--inject-fault", "nan@7", "--on-spike", "rewind"]
    assert run_on_ranks(*FLAGS, *places, *faults, ranks=2) == [0, 0]
    told, _ = run("told", "--leave-out-samples", "12-16")
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(tensor, weights(told)[name], rtol=1e-4, atol=5e-6)


def test_rows_that_go_wrong_again_and_again_end_the_run_with_a_status_of_their_own(run):
    faults = ["--inject-fault", "nan@3", "nan@4", "--log-interval", "1", "--save-interval", "1"]
    _, lines = run("often", *faults, "--on-spike", "rewind", "--most-spikes", "1", status=3)
    assert lines[-1].startswith("error: steps 4 to 4 went wrong twice")
    assert "--most-spikes" in lines[-1]


def test_a_step_is_skipped_and_the_next_ones_are_taken(run):
    folder, lines = run("skip", "--inject-fault", "nan@7", "--on-spike", "skip")
    [line] = [line for line in lines if line.startswith("note: step 7 went wrong")]
    assert "; skipped; its rows are 12 to 13, whose proteins are in" in line
    assert all(torch.isfinite(tensor).all() for tensor in weights(folder).values())
    _, lines = run("skips", "--inject-fault", "nan@5", "nan@6", "--on-spike", "skip", "--most-spikes", "2", status=3)
    assert "2 steps in a row went wrong and were not taken" in lines[-1]


def test_by_default_a_step_that_goes_wrong_is_told(run):
    _, lines = run("warn", "--inject-fault", "nan@7")
    [line] = [line for line in lines if line.startswith("note: step 7 went wrong: loss nan")]
    assert "; skipped;" in line  # without a gradient there is nothing to take
    _, lines = run("warns", "--inject-fault", "nan@5", "nan@6", "nan@7", status=3)
    assert "3 steps in a row went wrong and were not taken, up to iteration 8" in lines[-1]


@pytest.mark.parametrize("way", ["warn", "skip"])
def test_a_step_that_went_wrong_is_compared_with_those_before_it_alone(run, way):
    flags = ["--inject-fault", "nan@7", "--on-spike", way, "--save-interval", "100"]
    told = [next(line for line in run(f"{way}-{interval}", *flags, "--log-interval", interval)[1] if "± " in line)
            for interval in (1, 10)]
    assert told[0].partition(";")[0] == told[1].partition(";")[0]


@pytest.mark.parametrize("way", ["warn", "skip"])
def test_two_steps_that_go_wrong_end_no_run_however_often_it_logs(run, way):
    folder, _ = run(way, "--inject-fault", "nan@6", "nan@7", "--on-spike", way, "--log-interval", "1")
    assert all(torch.isfinite(tensor).all() for tensor in weights(folder).values())


def test_a_loss_scale_that_comes_down_to_its_least_ends_no_run(run):
    folder, _ = run("down", "--fp16", "--initial-loss-scale", 1e5 * 2**80, "--min-loss-scale", 1e5, "--hysteresis", "1",
                    "--log-interval", "100", "--save-interval", "1000", "--train-iters", "110")
    scales = losses(folder, name="loss_scale")
    assert scales[100] == scales[110] == 1e5 and losses(folder)[110] < losses(folder)[100]


def test_steps_that_go_wrong_elsewhere_each_time_end_the_run(monkeypatch):
    first = iter((5, 4, 3, 2, 1, 1))

    def trained(run, *_):
        number = next(first)
        raise RewindError(WrongSteps(number, number, range(number, number + 1)), is_again=False)

    run = SimpleNamespace(log=Log(is_speaker=False), state=TrainState(), mesh=Mesh(), config=Config(
        guards=GuardsConfig(on_spike="rewind"), checkpoint=CheckpointConfig(save="nowhere")))
    monkeypatch.setattr(rewinding, "train", trained)
    monkeypatch.setattr(rewinding, "build", lambda *_: run)
    with pytest.raises(DivergedError, match="steps up to 5 went wrong 5 times, different ones each time"):
        rewinding.train_to_its_end(run.config, Mesh(), run.log, None, None, None)
    assert [*first] == [1]


def test_a_rate_at_which_every_step_goes_wrong_is_not_laid_to_the_device(run):
    flags = ["--optimizer", "adam", "--lr", "1e9", "--log-interval", "1", "--on-spike", "rewind"]
    _, lines = run("fast", *flags, status=3)
    assert "went wrong twice" in lines[-1] and "as often as --most-spikes allows" in lines[-1], lines[-1]


def test_rows_behind_the_run_cannot_be_left_out(run):
    run("plain", "--exit-interval", "4")
    _, lines = run("plain", "--leave-out-samples", "2-12", status=2)
    assert lines[-1] == ("error: --leave-out-samples 2-12: the run has come to sample 8 already; give 8-12, or go on "
                         "from an older checkpoint")


def test_stages_of_a_pipeline_skip_the_same_step(run, corpus, tmp_path):
    faults = ["--inject-fault", "nan@7", "--on-spike", "skip", "--num-layers", "2"]
    places = ["--data-path", corpus, "--save", tmp_path / "ranks", "--load", tmp_path / "ranks"]
    assert run_on_ranks(*FLAGS, *places, *faults, "--pipeline-model-parallel-size", "2", ranks=2) == [0, 0]
    alone, _ = run("alone", *faults)
    for name, tensor in weights(tmp_path / "ranks").items():
        torch.testing.assert_close(tensor, weights(alone)[name], rtol=1e-4, atol=5e-6)
