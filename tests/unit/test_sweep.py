"""A sweep: which trials it makes and stops, what it keeps, and what it reports.

A stand-in plays the trials: it writes the records of a run with a known loss, saves a file in place of a checkpoint,
and exits on SIGTERM.
"""

import csv
import errno
import json
import math
import os
import random
import signal
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from megatron.data.corpus.vocab import DEFAULT_VOCAB
from megatron.study import one_precision, running
from megatron.study.outcome import as_table, edges, outcomes
from megatron.study.record import FINISHED, STOPPED, SweepRecord, TrialResult, held
from megatron.study.running import Sweep, falls_behind
from megatron.study.sampling import plan
from megatron.study.settings import Space, Trial
from megatron.study.sweep_picture import draw_sweep
from tests.indexed_files import write_indexed
from tools.sweep import environments, main

BASE = ("--seq-length", "8", "--micro-batch-size", "1", "--train-iters", "30")
CORPORA = (*BASE, "--eval-each", "--data-path", "1", "x/a", "2", "y/a", "1", "z/b")
SLOW = (*BASE, "--optimizer", "sgd", "--sgd-momentum")
STAND_IN = '''
import argparse, json, math, os, signal, sys, time
from pathlib import Path
parser = argparse.ArgumentParser()
for name in ("lr", "save", "load", "train-iters", "seed"):
    parser.add_argument(f"--{name}")
parser.add_argument("--sgd-momentum", type=float, default=0)  # from this rate on a trial waits at step 20 for its end
parser.add_argument("--clip-grad", type=float, default=1)  # above 1 a trial diverges
given, rest = parser.parse_known_args()
print(f"threads={os.environ.get('OMP_NUM_THREADS')}", *sys.argv[1:], flush=True)
if given.seed == "13":
    sys.exit("error: unlucky") if given.lr == "1" else None
    print("error: no such thing")
    sys.exit(2)
if given.clip_grad > 1:
    print("error: the gradients were not finite", file=sys.stderr)
    sys.exit(3)
folder, asked = Path(given.save), []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
done = max((int(place.name[5:]) for place in folder.glob("iter_*")), default=0)
for step in range(done + 10, int(given.train_iters) + 1, 10):
    loss = abs(math.log10(float(given.lr)) + 3) + 1 / step + 0.25 * int(given.seed or 0)
    record = {"iteration": step, "consumed_residues": step, "loss": None if float(given.lr) > 1 else loss}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "train", "skipped_iterations": 0} | record) + "\\n")
        file.write(json.dumps({"kind": "valid"} | record) + "\\n")
    (folder / f"iter_{step:07d}").mkdir()
    while 0 < given.sgd_momentum <= float(given.lr) and step == 20 and not asked:
        time.sleep(0.01)
    if asked:
        break
'''


@pytest.fixture
def sweep(tmp_path, monkeypatch, capsys):
    """A function that runs the tool over the stand-in; gives its exit status, its lines and its errors."""
    (tmp_path / "program.py").write_text(STAND_IN)
    monkeypatch.setattr(running, "PROGRAM", tmp_path / "program.py")
    monkeypatch.setattr(running, "POLL_S", 0.01)
    monkeypatch.chdir(tmp_path)

    def run(*own, base=BASE):
        status = main(["--output", "out", *own, "--", *base])
        said = capsys.readouterr()
        return status, said.out.splitlines(), said.err

    return run


def begun(lines):
    return [line.split(": ")[1] for line in lines if line.startswith("trial ")]


def results(folder="out"):
    found = map(json.loads, Path(folder, "sweep.jsonl").read_text().splitlines())
    return {result["trial"]: result for result in found}


def space(**values):
    return Space(tuple(values), tuple(map(tuple, values.values())), ("1", "2"), BASE)


def test_a_grid_takes_every_setting_with_one_seed_before_the_next(sweep):
    own = ("--vary", "lr", "1e-4", "1e-3", "--vary", "swiglu", "true", "false", "--seeds", "1", "2")
    status, lines, error = sweep(*own)
    assert (status, error) == (0, "")
    assert begun(lines) == [f"lr={lr}_swiglu={swiglu}_seed={seed}" for seed in "12" for lr in ("1e-4", "1e-3")
                            for swiglu in ("true", "false")]
    assert lines[0].startswith("trial 1 of 8: ") and "; 7 to go, about " in lines[1]
    assert "finished: loss 1.2833 at step 30, in " in lines[1]  # |-4 + 3| + 1 / 30 + 0.25
    said = Path("out/lr=1e-4_swiglu=false_seed=2/run.log").read_text().split()
    assert said[1:3] == ["--keep-checkpoints", "1"] and "--no-swiglu" in said
    assert said[said.index("--seed") + 1] == "2" and said[said.index("--load") + 1] == said[said.index("--save") + 1]


def test_the_end_says_the_best_and_draws_and_keeps_a_table(sweep):
    _, lines, _ = sweep("--vary", "lr", "1e-4", "1e-3", "--seeds", "1", "2")
    at = lines.index("validation loss in nats, the best first:")
    assert lines[at + 3].split()[:5] == ["1e-3", "0.4083", "±", "0.1768", "2"]
    assert lines[-2:] == ["note: --lr 1e-3 is the largest that was tried: widen its list, a larger one may be better",
                          "best: --lr 1e-3"]
    with open("out/sweep.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["lr"], row["seed"], row["outcome"], row["steps"]) for row in rows] == [
        (lr, seed, "finished", "30") for seed in "12" for lr in ("1e-4", "1e-3")]
    assert Path("out/sweep.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_done_is_not_run_again_and_a_longer_list_adds_to_it(sweep):
    sweep("--vary", "lr", "1e-4", "1e-3")
    _, again, _ = sweep("--vary", "lr", "1e-4", "1e-3")
    assert begun(again) == [] and again[-1] == "best: --lr 1e-3"
    _, wider, _ = sweep("--vary", "lr", "1e-4", "1e-3", "1e-2")
    assert begun(wider) == ["lr=1e-2"] and wider[0].startswith("trial 3 of 3: ")
    assert wider[-1] == "best: --lr 1e-3" and not any("widen" in line for line in wider)


@pytest.mark.parametrize("flags", ["--preset demo --optimizer adam", "--precision auto"])
def test_the_precision_of_all_trials_is_settled_once(sweep, monkeypatch, flags):
    measured = iter([("fp32", "of its speed")])
    monkeypatch.setattr("megatron.train.setup.precision.precision_here", lambda config: next(measured))
    monkeypatch.setattr(one_precision, "ProcessPoolExecutor", lambda count, context: ThreadPoolExecutor(count))
    base = (*flags.split(), *BASE)
    _, lines, error = sweep("--vary", "lr", "1e-4", base=base)
    assert (lines[0], error) == ("precision: fp32 in all trials; of its speed", "")
    _, lines, _ = sweep("--vary", "lr", "1e-4", "1e-3", base=base)
    assert begun(lines) == ["lr=1e-3"]
    for rate in ("1e-4", "1e-3"):
        words = Path(f"out/lr={rate}/run.log").read_text().split()
        assert "--no-bf16" in words and "auto" not in words


def test_a_trial_that_diverges_is_not_finite_and_is_not_tried_again(sweep):
    own = ("--vary", "clip-grad", "1", "2")
    status, lines, _ = sweep(*own, base=(*BASE, "--lr", "1e-3"))
    assert status == 0 and [result["outcome"] for result in results().values()] == ["finished", "not finite"]
    assert begun(sweep(*own, base=(*BASE, "--lr", "1e-3"))[1]) == []


def test_a_trial_worse_than_the_median_of_the_others_is_stopped_and_stays_so(sweep):
    own = ("--vary", "lr", "1e-3", "1e-2", "1e-1", "1", "--early-stop", "20")
    slow = (*SLOW, "0.1")
    _, lines, _ = sweep(*own, base=slow)
    found = results()
    assert [found[f"lr={lr}"]["outcome"] for lr in ("1e-3", "1e-2", "1e-1", "1")] == [
        "finished", "finished", "stopped early", "stopped early"]
    assert found["lr=1"]["steps"] == 20 and found["lr=1"]["loss"] == pytest.approx(3 + 1 / 20)
    assert any(line.split()[-2:] == ["stopped", "early"] for line in lines)
    assert begun(sweep(*own, base=slow)[1]) == []


def test_a_loss_that_is_not_finite_stops_a_trial(sweep):
    sweep("--vary", "lr", "2", "--early-stop", base=(*SLOW, "0.1"))
    assert results()["lr=2"]["outcome"] == "not finite" and results()["lr=2"]["steps"] <= 20


@pytest.mark.parametrize(("loss", "others", "expected"), [
    (2.0, [], False), (2.0, [1.0], False), (2.0, [1.0, 1.5], True), (2.0, [1.0, 3.0], False), (2.1, [1.0, 3.0], True),
    (2.0, [1.0, 2.0, 3.0], False), (2.5, [1.0, 2.0, 3.0], True)])
def test_the_median_decides_who_falls_behind(loss, others, expected):
    assert falls_behind(loss, others) is expected


def test_two_trials_at_once_share_the_cores(sweep, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(6))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    own = ("--vary", "lr", "1e-4", "1e-3", "1e-2", "--jobs", "2")
    _, lines, _ = sweep(*own)
    assert [line.split(":")[0] for line in lines[:2]] == ["trial 1 of 3", "trial 2 of 3"]
    assert {Path("out", name, "run.log").read_text().split()[0] for name in results()} == {"threads=3"}
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert [one["CUDA_VISIBLE_DEVICES"] for one in environments(3)] == ["4", "7", "4"]


def test_a_request_to_stop_is_passed_on_and_the_same_command_goes_on(sweep, monkeypatch):
    slow = (*SLOW, "1e-3")
    monkeypatch.setattr(running.Sweep, "_begin", _and_signal(running.Sweep._begin))
    status, lines, _ = sweep("--vary", "lr", "1e-3", "1e-2", base=slow)
    assert status == 0 and lines[-1] == "stopped: the same command goes on"
    assert begun(lines) == ["lr=1e-3"] and results()["lr=1e-3"]["outcome"] == "begun"
    monkeypatch.undo()


def _and_signal(begin):
    def begin_and_signal(self, trial):
        begin(self, trial)
        folder = Path("out", self._space.folder_name(trial))
        while not list(folder.glob("iter_*")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    return begin_and_signal


def test_weights_to_begin_with_are_loaded_once(sweep):
    Path("weights").mkdir()
    base = (*BASE, "--finetune", "--load", "weights")
    sweep("--vary", "lr", "1e-3", base=base)
    words = Path("out/lr=1e-3/run.log").read_text().split()
    assert [words[at + 1] for at, word in enumerate(words) if word == "--load"] == ["weights"]
    Path("out/sweep.jsonl").unlink()
    sweep("--vary", "lr", "1e-3", base=base)
    again = Path("out/lr=1e-3/run.log").read_text().splitlines()[1].split()
    assert again[-3:] == ["--load", "out/lr=1e-3", "--no-finetune"]


def test_a_trial_that_fails_is_tried_again_and_a_mistake_ends_the_sweep(sweep):
    status, lines, error = sweep("--vary", "lr", "1", "0.1", "--seeds", "13")
    assert (status, error) == (2, "error: trial lr=0.1_seed=13: no such thing\n")
    assert lines[1].startswith("  failed (exit status 1: error: unlucky): no loss yet, in ")
    assert begun(sweep("--vary", "lr", "1", "--seeds", "13")[1]) == ["lr=1_seed=13"]


@pytest.mark.parametrize(("own", "base", "said"), [
    ([], BASE, "--vary is missing"),
    (["--vary", "lr"], BASE, "--vary lr has no values"),
    (["--vary", "lrr", "1"], BASE, "unknown argument --lrr; did you mean --lr?"),
    (["--vary", "lr", "1e-3", "fast"], BASE, "--lr is 'fast'; it must be a number"),
    (["--vary", "lr", "1", "1"], BASE, "--vary lr has 1 twice"),
    (["--vary", "swiglu", "maybe"], BASE, "--vary swiglu has maybe; --swiglu is a switch"),
    (["--vary", "data-path", "a/b", "a-b"], (*BASE, "--lr", "1"), "the values a/b and a-b would share the folder"),
    (["--vary", "lr", "1", "--seeds", "1", "1"], BASE, "--seeds has 1 twice"),
    (["--vary", "seed", "1", "2", "--seeds", "1", "2"], BASE, "--vary seed beside --seeds"),
    (["--vary", "lr", "1", "--metric", "loss"], BASE, "--metric is loss; give valid"),
    (["--vary", "lr", "1", "--metric", "valid_ema"], BASE, "--metric valid_ema is of the average of the weights"),
    (["--vary", "lr", "1", "--metric", "valid/a"], BASE, "--metric valid/a is of one corpus, which needs --eval-each"),
    (["--vary", "lr", "1", "--metric", "test/d"], CORPORA, "--metric test/d: --data-path has no weighted corpus d; it "
     "has x/a, y/a, b; give one of those, or --metric test"),
    (["--vary", "lr", "1", "--metric", "valid/a"], (*BASE, "--eval-each", "--data-path", "x/a"),
     "--metric valid/a: --data-path has no weighted corpus a; it has none"),
    (["--vary", "lr", "1", "--jobs", "0"], BASE, "--jobs is 0"),
    (["--vary", "lr", "1", "--sampler", "random"], BASE, "--sampler random needs --trials"),
    (["--vary", "lr", "1"], (*BASE, "--nix"), "unknown argument --nix"),
    (["--vary", "lr", "1"], (*BASE, "--save", "x"), "--save is not for a sweep"),
    (["--vary", "lr", "1"], (*BASE, "--load", "x"), "--load x would have every trial go on with one run"),
])
def test_what_makes_no_sweep_is_one_line(sweep, own, base, said):
    status, lines, error = sweep(*own, base=base)
    assert (status, lines) == (2, []) and error.startswith(f"error: {said}") and error.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.parametrize(("metric", "flags", "name"), [
    ("valid", ["--split", "1"], "validation loss"), ("test", ["--split", "9,1,0"], "test loss"),
    ("test", ["--data-path", "few"], "test loss"), ("test/few", ["--eval-each", "--data-path", "1", "many", "1", "few"],
                                                    "test loss on few")])
def test_a_loss_of_a_part_without_proteins_is_refused_before_a_trial(sweep, metric, flags, name):
    for prefix, number in (("few", 20), ("many", 1000)):
        write_indexed(prefix, [np.arange(5, dtype=np.uint8)] * number)
    status, lines, error = sweep("--vary", "lr", "1", "--metric", metric, base=(*BASE, *flags))
    assert (status, lines) == (2, []) and not Path("out").exists()
    assert error.startswith(f"error: --metric {metric}: --split ")
    assert error.endswith(f" leaves no protein that the {name} is of; give it a share, such as 90,5,5, or another "
                          "--metric\n")


@pytest.mark.parametrize(("rank", "said"), [
    ("0", "error: a sweep is one process, and srun started 2; start one: srun --ntasks=1\n"), ("1", "")])
def test_tasks_that_would_sweep_side_by_side_are_refused_at_once_in_one_line(sweep, monkeypatch, rank, said):
    for name, value in (("PROCID", rank), ("LOCALID", rank), ("STEP_NUM_TASKS", "2"), ("STEP_NODELIST", "node[1-2]")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert sweep("--vary", "lr", "1") == (2, [], said)
    assert not Path("out").exists()


def test_the_folder_of_something_else_is_refused(sweep):
    Path("out").mkdir()
    Path("out/notes.txt").touch()
    assert sweep("--vary", "lr", "1")[2] == "error: --output out holds notes.txt and no sweep; give a new folder\n"


def test_a_file_system_without_locks_takes_a_sweep(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr("fcntl.flock", refuse)
    with held(tmp_path / "out", print):
        assert (tmp_path / "out").is_dir()


def test_another_sweep_in_the_folder_is_refused_once_a_trial_has_got_anywhere(sweep):
    assert sweep("--vary", "lr", "0.1", "--seeds", "13")[0] == 2  # nothing came of it
    assert sweep("--vary", "lr", "1")[0] == 0
    assert sweep("--vary", "lr", "1", base=(*BASE[:-1], "60"))[2] == (
        "error: --output out holds another sweep: its trials have --train-iters 30 where here is --train-iters 60; "
        "give a new folder, or what it has\n")
    assert "it varies lr where here is lr min-lr" in sweep("--vary", "lr", "1", "--vary", "min-lr", "0")[2]


def test_another_metric_is_read_of_trials_that_are_done(sweep):
    own = ("--vary", "lr", "1e-4", "1e-3")
    sweep(*own)
    assert "--metric test: out/lr=1e-4 ended without such a loss" in sweep(*own, "--metric", "test")[2]
    for name in results():
        metrics = Path("out", name, "metrics.jsonl")
        record = json.loads(metrics.read_text().splitlines()[-1]) | {"kind": "test"}
        metrics.write_text(metrics.read_text() + json.dumps(record | {"loss": 1.5 - record["loss"]}) + "\n")
    _, again, _ = sweep(*own, "--metric", "test")
    assert begun(again) == [] and "test loss in nats, the best first:" in again and again[-1] == "best: --lr 1e-4"


def test_of_trials_that_were_evaluated_on_different_data_none_is_said_to_be_the_best(sweep):
    own, said = ("--vary", "lr", "1e-4", "1e-3"), "note: these losses are not all of the same data"
    lines = sweep(*own)[1]
    assert not any(line.startswith(said) for line in lines) and lines[-1] == "best: --lr 1e-3"
    metrics = Path("out", "lr=1e-3", "metrics.jsonl")
    last = json.loads(metrics.read_text().splitlines()[-1])
    metrics.write_text(f"{json.dumps(last | {'measured_on': 'x'})}\n")
    lines = sweep(*own)[1]
    assert lines[-1].startswith(said) and "best" not in " ".join(lines)


def test_a_trial_is_not_stopped_because_of_losses_on_other_data(sweep):
    rates, slow = ("1e-3", "2e-3", "1e-1"), Trial(("1e-1",), None)
    assert sweep("--vary", "lr", *rates)[0] == 0
    values = Space(("lr",), (rates,), (None,), BASE)
    record = SweepRecord(Path("out"), values, "valid")
    judge = Sweep(values, record, "valid", early_stop=20, environments=[{}], lock=0, tell=print)
    metrics = {trial: Path("out", trial, "metrics.jsonl") for trial in results()}
    metrics["lr=1e-1"].write_text("".join(metrics["lr=1e-1"].read_text().splitlines(keepends=True)[:-2]))
    found = []
    for digest in ("x", "y"):
        for trial, path in metrics.items():
            told = digest if trial != "lr=1e-1" else "x"
            lines = [json.loads(line) | {"measured_on": told} for line in path.read_text().splitlines()]
            path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        found.append(judge._judged(running._Running(slow, record[slow], 0, None, 0.0)))
    assert found == [STOPPED, None]


@pytest.mark.parametrize(("name", "said"), [
    ("data-path", "other.idx"), ("vocab-file", "other: cannot read the vocabulary"),
    ("cluster-file", "--cluster-file other is not there"), ("load", "--load other is not there")])
def test_paths_that_are_not_there_are_told_before_the_first_trial_and_of_done_trials_need_not_be(sweep, name, said):
    write_indexed("here", [np.arange(5, dtype=np.uint8)] * 20)
    Path("here").write_text(DEFAULT_VOCAB.read_text())
    base = (*BASE, "--split", "9,1,0", "--lr", "1e-3", "--finetune", "--load", "here")
    status, lines, error = sweep("--vary", name, "here", "other", base=base)
    assert (status, begun(lines)) == (2, []) and error.startswith("error: ") and said in error
    assert sweep("--vary", name, "here", base=base)[0] == 0
    for place in (*Path().glob("here.*"), Path("here")):
        place.unlink()
    assert sweep("--vary", name, "here", base=base)[0] == 0


def test_a_file_of_flags_is_read_for_each_trial_and_is_another_sweep_once_it_is_another(sweep):
    Path("run.toml").write_text("seq-length = 8\nmicro-batch-size = 1\ntrain-iters = 30\nkeep-checkpoints = 7\n"
                                "lr = 9.0")
    own, base = ("--vary", "lr", "1e-3", "1e-2"), ("--config", "run.toml", "--swiglu")
    status, lines, error = sweep(*own, base=base)
    assert (status, error, lines[-1]) == (0, "", "best: --lr 1e-3")
    said = Path("out/lr=1e-3/run.log").read_text().split()
    assert {"--seq-length=8", "--train-iters=30", "--swiglu"} <= set(said) and "--config" not in said
    assert not {"--keep-checkpoints=7", "--lr=9.0"} & set(said)
    Path("run.toml").write_text("seq-length = 8\nmicro-batch-size = 1\ntrain-iters = 40")
    assert "holds another sweep: its trials have " in sweep(*own, base=base)[2]


def test_random_draws_some_of_the_grid_and_the_same_again(tmp_path):
    values = space(lr=["1", "2", "3"], seed_of=["4", "5", "6"])
    records = [SweepRecord(_new(tmp_path / name), values, "valid") for name in "ab"]
    drawn = [list(plan("random", values, record, 4).upcoming) for record in records]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 8  # four settings with two seeds
    assert [trial.seed for trial in drawn[0]] == ["1"] * 4 + ["2"] * 4


def test_without_optuna_that_is_said(sweep, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    status, _, error = sweep("--vary", "lr", "1", "--sampler", "optuna", "--trials", "1")
    assert status == 2 and error.startswith("error: --sampler optuna needs optuna, which is not installed")


def test_optuna_is_told_what_was_found_and_asked_until_there_are_enough(tmp_path, monkeypatch):
    optuna = _Optuna()
    monkeypatch.setitem(sys.modules, "optuna", optuna.module)
    values = space(lr=["1e-2", "1e-3", "1e-4"], normalization=["LayerNorm", "RMSNorm"])
    record = SweepRecord(_new(tmp_path / "a"), values, "valid")
    begun_before = Trial(("1e-3", "RMSNorm"), "1")
    record.put(record.begun(begun_before))
    planned, taken = plan("optuna", values, record, 3), []
    assert planned.num_trials == 6
    for trial in planned.upcoming:
        taken.append(trial)
        result = record.begun(trial)
        record.put(TrialResult(result.trial, result.values, trial.seed, "finished", float(trial.setting[0]), 30))
    assert taken[:2] == [begun_before, Trial(begun_before.setting, "2")] and len(taken) == 6
    assert {trial.setting[0] for trial in taken[2:]} == {"1e-4"}  # the best value by what it was told
    assert optuna.told[0]["params"] == {"lr": 1, "normalization": 1} and optuna.told[0]["value"] == 1e-3


def test_optuna_itself_finds_the_best_rate_of_many_in_fewer_trials(tmp_path):
    pytest.importorskip("optuna")
    rates = [f"{2**-power:g}" for power in range(16)]
    values = space(lr=rates, normalization=["LayerNorm", "RMSNorm"])
    record = SweepRecord(_new(tmp_path / "a"), values, "valid")
    planned, taken = plan("optuna", values, record, 14), []
    for trial in planned.upcoming:
        begun, rate = record.begun(trial), float(trial.setting[0])
        loss = abs(math.log2(rate) + 11) / 10 + (trial.setting[1] == "LayerNorm")  # best at 2**-11 with RMSNorm
        outcome = STOPPED if loss > 1.3 else FINISHED
        record.put(TrialResult(begun.trial, begun.values, trial.seed, outcome, loss, 30))
        taken.append((loss, trial.setting))
    assert len({setting for _, setting in taken}) == 14
    assert min(taken)[1][1] == "RMSNorm" and min(taken)[0] <= 0.2
    assert sum(loss for loss, _ in taken[-7:]) < sum(loss for loss, _ in taken[:7])


class _Optuna:
    """Suggests the smallest step of each scale of numbers, by chance what has none; keeps what it is told."""

    def __init__(self):
        self.told, chance = [], random.Random(1)

        def ask(scales):
            return types.SimpleNamespace(params={name: scale[0] if isinstance(scale, tuple) else chance.choice(scale)
                                                 for name, scale in scales.items()})

        study = types.SimpleNamespace(add_trial=self.told.append, ask=ask)
        self.module = types.SimpleNamespace(
            create_study=lambda sampler: study,
            logging=types.SimpleNamespace(set_verbosity=lambda level: None, WARNING=0),
            samplers=types.SimpleNamespace(TPESampler=lambda **options: None),
            distributions=types.SimpleNamespace(IntDistribution=lambda low, high: (low, high),
                                                CategoricalDistribution=lambda choices: choices),
            trial=types.SimpleNamespace(create_trial=lambda **facts: facts,
                                        TrialState=types.SimpleNamespace(COMPLETE="complete", PRUNED="pruned")))


def _new(folder):
    folder.mkdir()
    return folder


def made(**values):
    """A finished result for each pair of a number and a loss; without a loss, one that was stopped at 9."""
    return [TrialResult(f"{name}{index}{seed}", {"lr": lr, "beta": beta}, str(seed),
                        "finished" if loss else "stopped early", loss or 9.0, 30)
            for name, rows in values.items() for index, (lr, beta, losses) in enumerate(rows)
            for seed, loss in enumerate(losses)]


def test_settings_that_were_not_finished_come_last_whatever_their_loss():
    rows = [("1", "x", [1.0, None]), ("2", "x", [3.0, 4.0]), ("10", "y", [2.0, 2.5]), ("3", "y", [None])]
    found = outcomes(made(a=rows))
    assert [(one.values["lr"], one.is_finished, one.mean) for one in found] == [
        ("10", True, 2.25), ("2", True, 3.5), ("1", False, 1.0), ("3", False, 9.0)]
    assert found[0].spread == pytest.approx(0.125**0.5) and found[3].spread is None
    assert as_table(found).splitlines()[3].endswith("1 finished, 1 stopped early")
    assert edges(found) == ["note: --lr 10 is the largest that was tried: widen its list, a larger one may be better"]


@pytest.mark.parametrize("rows", [
    [("1e-3", "x", [2.0])],
    [("1e-4", "x", [2.0, 2.1]), ("1e-3", "x", [2.5, 2.6]), ("1", "x", [None])],
    [("1e-4", "x", [2.0]), ("1e-3", "x", [2.5]), ("1e-4", "y", [None])]])
def test_a_picture_is_drawn_of_one_flag_and_of_two(tmp_path, rows):
    draw_sweep(outcomes(made(a=rows)), "loss", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_is_drawn_of_more_flags(tmp_path):
    found = [TrialResult(f"{a}{b}{c}", {"a": a, "b": b, "c": c}, None, "finished", float(a), 3)
             for a in "12" for b in "xy" for c in "34"]
    draw_sweep(outcomes(found), "loss", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
