"""Comparison of runs: where a curve first reaches a loss, means over runs, names of runs, and what is printed."""

import json

import numpy as np
import pytest

from megatron.errors import ConfigError
from megatron.log import in_time
from megatron.study import naming
from megatron.study.curves import AXES, Curve, mean_curve, read_curve
from megatron.study.table import in_short, table
from tools.compare_runs import main

# At step s: 100 s residues, 2 s seconds, s squared FLOPs.
POINTS = {"iteration": lambda step: step, "consumed_residues": lambda step: 100 * step,
          "training_s": lambda step: 2.0 * step, "consumed_flops": lambda step: float(step**2)}


def write_run(folder, losses, kind="valid", without=(), **marks):
    """A run with these losses by their steps; `without`: numbers that its edition did not record."""
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as file:
        for step, loss in losses.items():
            numbers = {name: of(step) for name, of in POINTS.items() if name not in without}
            file.write(json.dumps({"kind": kind, **numbers, "loss": loss, **marks}) + "\n")
    return folder


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The folder of three runs, which is the one that is worked in."""
    write_run(tmp_path / "slow", {10: 4.0, 20: 3.0, 40: 2.5})
    write_run(tmp_path / "fast", {10: 3.5, 20: 2.5, 40: 2.25})
    write_run(tmp_path / "old", {10: 2.75, 20: 2.5}, without=("training_s", "consumed_flops"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def curve(losses):
    steps = np.array(sorted(losses), dtype=float)
    return Curve(np.array([losses[step] for step in sorted(losses)]), {"steps": steps, "seconds": 2 * steps})


@pytest.mark.parametrize(("loss", "step"), [(3.0, 20.0), (2.75, 30.0), (2.5, 40.0), (3.25, 17.5), (4.0, 10.0),
                                            (9.0, 10.0), (2.499, None)])
def test_a_loss_is_reached_on_the_line_between_two_evaluations(loss, step):
    found = curve({10: 4.0, 20: 3.0, 40: 2.5}).reached(loss)
    assert found == (None if step is None else {"steps": step, "seconds": 2 * step})


def test_a_loss_that_is_left_again_counts_from_its_first_time():
    assert curve({1: 3.0, 2: 2.0, 3: 4.0, 4: 1.0}).reached(2.5)["steps"] == 1.5


def test_a_loss_that_is_not_finite_is_no_point(tmp_path):
    found = read_curve(write_run(tmp_path / "run", {1: 3.0, 2: None, 3: 2.0}), "valid")
    assert (found.losses.tolist(), found.axes["steps"].tolist()) == ([3.0, 2.0], [1, 3])
    assert found.axes["flops"].tolist() == [1.0, 9.0]


def test_a_run_that_diverged_ends_not_finite(runs, capsys):
    write_run(runs / "fast", {50: None, 60: None})
    assert main(["slow", "fast", "both=slow,fast"]) == 0
    slow, fast, both, note, *_ = capsys.readouterr().out.splitlines()[3:]
    assert slow.split()[:3] == ["slow", "40", "2.5000"]
    assert fast.split()[:6] == ["fast", "60", "not", "finite", "2.2500", "40"]
    assert both.split()[:4] == ["both", "60", "not", "finite"]
    assert note == "note: fast is not finite from step 50 on"
    assert main(["fast", "--json"]) == 0
    facts, = json.loads(capsys.readouterr().out)["runs"]
    assert (facts["steps"], facts["final_loss"], facts["not_finite_from"]) == (60, None, 50)
    with pytest.raises(ConfigError, match="has no valid loss that is finite"):
        read_curve(write_run(runs / "lost", {1: None}), "valid")


def test_what_one_record_lacks_is_missing_as_an_axis(runs):
    assert read_curve(runs / "old", "valid").missing == ["seconds", "flops"]
    write_run(runs / "fast", {50: 2.0}, without=("consumed_residues",))
    assert read_curve(runs / "fast", "valid").missing == ["residues"]


def test_a_mean_of_runs_is_that_of_the_steps_they_share():
    losses = np.random.default_rng(1).random((3, 4))
    curves = [curve(dict(zip((10, 20, 30, 40), row, strict=True))) for row in losses] + [curve({10: 1.0, 30: 2.0})]
    found, shared = mean_curve(curves), np.concatenate([losses[:, [0, 2]], [[1.0, 2.0]]])
    assert found.axes["steps"].tolist() == [10, 30] and found.axes["seconds"].tolist() == [20, 60]
    assert found.losses == pytest.approx(shared.mean(0))
    assert found.spread == pytest.approx(np.sqrt(((shared - shared.mean(0))**2).sum(0) / 3))


def test_smoothing_keeps_a_line_and_averages_noise():
    line = curve({step: 5.0 - step / 100 for step in range(200)})
    assert line.smoothed().losses == pytest.approx(line.losses)
    noise = curve({step: (-1.0)**step for step in range(200)})
    assert np.abs(noise.smoothed().losses[5:-5]).max() < 0.1


def test_the_table_says_where_each_came_to_the_worst_of_the_best_losses(runs, capsys):
    assert main(["slow", "fast", "old"]) == 0
    about, _, heads, slow, fast, old, note, _, picture = capsys.readouterr().out.splitlines()
    assert "to come to 2.5000" in about
    assert heads.split() == ["run", "steps", "final", "best", "at", "step", "steps", "residues", "time", "FLOPs"]
    assert slow.split() == ["slow", "40", "2.5000", "2.5000", "40", "40", "4.00k", "1", "min", "1.60k"]
    assert fast.split()[5:] == ["20", "(0.50x)", "2.00k", "(0.50x)", "40", "s", "(0.50x)", "400", "(0.25x)"]
    assert old.split()[5:] == ["20", "(0.50x)", "2.00k", "(0.50x)", "?", "?"]
    assert note.startswith("note: old is not drawn over seconds, flops: its metrics.jsonl")
    assert picture == "curves: compare.png"
    assert (runs / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_were_evaluated_on_different_data_are_said_not_to_compare(runs, capsys):
    for name, data in (("a", "x"), ("b", "x"), ("c", "y")):
        write_run(runs / name, {10: 3.0, 20: 2.5}, measured_on=data)
    write_run(runs / "c", {30: 9.0, 40: 8.0}, measured_on="x")
    for names, is_told in ((["a", "b"], False), (["a", "c"], False), (["slow", "fast"], False), (["a", "slow"], True),
                           (["mean=a,slow"], True)):
        assert main(names) == 0
        said = capsys.readouterr().out
        assert ("note: these losses are not all of the same data" in said) is is_told, names
        assert ("note: c was evaluated on other data before: 2 of its losses are left out" in said) is ("c" in names)
    assert main(["c", "--json"]) == 0
    facts, = json.loads(capsys.readouterr().out)["runs"]
    assert (facts["best_loss"], facts["measured_on"]) == (8.0, ["x"])


def test_json_has_what_was_not_reached_or_recorded_as_null(runs, capsys):
    write_run(runs / "fast", dict.fromkeys(range(1, 40), 2.5), kind="train")
    assert main(["slow", "both=fast,old", "--json", "--loss", "2.55", "--smooth", "--output", "a.svg"]) == 0
    slow, both = json.loads(capsys.readouterr().out)["runs"]
    assert slow["reached"] == pytest.approx({"steps": 38.0, "residues": 3800.0, "seconds": 76.0, "flops": 1480.0})
    assert (both["name"], both["folders"], both["steps"]) == ("both", ["fast", "old"], 20)
    assert both["final_loss"] == 2.5 and both["final_spread"] == 0.0
    assert both["reached"].keys() == AXES.keys() and both["reached"]["flops"] is None
    assert (runs / "a.svg").read_text().startswith("<?xml")
    assert main(["slow", "--loss", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["reached"] is None


@pytest.mark.parametrize(("words", "said"), [
    (["nowhere"], "nowhere is no folder"),
    (["."], ". holds no metrics.jsonl; give the runs in it, ./fast and so on"),
    (["slow", "--metric", "valid/a"], "slow has no valid/a loss; it has valid"),
    (["slow", "slow"], "slow is given twice"),
    (["slow", "--loss", "nan"], "--loss is nan; give a number of nats"),
    (["slow", "--output", "no/a.png"], "--output no/a.png cannot be written (No such file or directory)"),
    (["slow", "--output", "a.exe"], "--output a.exe cannot be written"),
    (["x=slow,late"], "these runs have no step in common"),
])
def test_what_cannot_be_compared_is_one_line(runs, words, said, capsys):
    write_run(runs / "late", {99: 2.0})
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}") and error.count("\n") == 1


def test_runs_are_called_by_the_flags_in_which_they_differ(tmp_path, monkeypatch):
    flags = {"a": {"lr": 1e-3, "seed": 1, "hidden_size": 32, "kv_channels": 16, "swiglu": True, "save": "a"},
             "a2": {"lr": 1e-3, "seed": 2, "hidden_size": 32, "kv_channels": 16, "swiglu": True, "save": "a2"},
             "b": {"lr": 3e-4, "seed": 1, "hidden_size": 64, "kv_channels": 32, "swiglu": False, "save": "b"},
             "new": {}}
    groups = [[tmp_path / name for name in names] for names in (("a", "a2"), ("b",))]
    monkeypatch.setattr(naming, "saved_flags", lambda folder: flags[folder.rpartition("/")[2]])
    differing = naming.differing_flags(groups)
    assert differing == [{"--hidden-size": 32, "--swiglu": True, "--lr": 1e-3},
                         {"--hidden-size": 64, "--swiglu": False, "--lr": 3e-4}]
    assert naming.names_of(groups, differing) == ["--hidden-size 32 --swiglu --lr 0.001",
                                                  "--hidden-size 64 --no-swiglu --lr 0.0003"]
    unsaved = [*groups, [tmp_path / "new"]]  # no checkpoint says its flags yet
    assert naming.names_of(unsaved, naming.differing_flags(unsaved)) == ["a", "b", "new"]


def test_folders_of_one_name_are_told_apart_by_what_they_lie_in(tmp_path):
    groups = [[tmp_path / one / two / "run"] for one, two in (("a", "c"), ("b", "c"))]
    assert naming.names_of(groups, [{}, {}]) == ["a/c/run", "b/c/run"]


def test_numbers_and_times_are_said_as_people_do():
    assert [in_short(number) for number in (0, 7, 12.5, 999, 999.7, 1234, 5.6e7, 1e21)] == [
        "0", "7", "12.5", "999", "1.00k", "1.23k", "56.0M", "1.00Z"]
    assert [in_time(seconds) for seconds in (0.31, 9.96, 59.4, 59.6, 3599, 3660, 90000)] == [
        "0.3 s", "10 s", "59 s", "1 min", "1 h 00 min", "1 h 01 min", "1 d 1 h"]
    assert table(["a", "bc"], [["xyz", "1"], ["", "234"]]) == "a     bc\nxyz    1\n     234"
