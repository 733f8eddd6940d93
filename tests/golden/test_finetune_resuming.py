"""Fine-tuning that was stopped or killed within an epoch resumes, and ends bitwise as if undisturbed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.checkpoint.store import iterations, open_place
from megatron.finetune import training
from megatron.finetune.progress import UNFINISHED, Progress
from megatron.train.setup import precision
from megatron.train.step.train_step import TrainStep
from tests.golden.test_finetune import MODEL, finetune, refusal, report_of, task
from tests.unit.test_pretrained import saved

ROOT = Path(__file__).resolve().parents[2]
# A few rows a step and several steps an epoch; dropout, and momenta of every optimizer.
COMMON = ["--epochs", 3, "--lr", 3e-2, "--bootstrap", 10, "--global-batch-size", 2, "--micro-batch-size", 1,
          "--log-interval", 3, "--patience", 0, "--hidden-dropout", 0.1]
WAYS = {"whole": ["--optimizer", "muon"], "adapters": ["--lora-rank", 2, "--lora-dropout", 0.1],
        "head": ["--head-only", "--optimizer", "sgd"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("base"), MODEL)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return task(tmp_path_factory.mktemp("data") / "residues", "residues")


@pytest.fixture(scope="module")
def command(base, data):
    return lambda way, save, *flags: finetune("own", "--load", base, "--data", data, "--save", save, *COMMON,
                                              *WAYS[way], *flags)


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    """A folder for each way of a run that came to its end at once."""
    root = tmp_path_factory.mktemp("undisturbed")
    for way in WAYS:
        assert command(way, root / way) == 0
    return root


def content_of_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def content(folder):
    """The weights, the report and what was logged, but for how fast it went."""
    (place,) = iterations(folder).values()
    weights = {name: tensor.read().tolist() for name, tensor in open_place(place).model.items()}
    return weights, report_of(folder), [{**record, "residues_per_s": 0} for record in content_of_metrics(folder)]


def after_steps(number, monkeypatch, act):
    """Has `act` called behind a step."""
    taken, step = [], TrainStep.__call__

    def counted(self, *arguments):
        found = step(self, *arguments)
        taken.append(1)
        if len(taken) == number:
            act()
        return found

    monkeypatch.setattr(TrainStep, "__call__", counted)


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_is_told_to_stop_goes_on_bitwise(way, command, undisturbed, tmp_path, monkeypatch, capsys):
    steps = report_of(undisturbed / way)["iterations"]
    assert steps % 3 == 0 and steps // 3 > 4
    with monkeypatch.context() as patch:
        after_steps(steps // 3 + 3, patch, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert command(way, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert f"stopped at iteration {steps // 3 + 4}; saved in" in said and "seed 1234 is done" not in said
    assert not (tmp_path / "out" / "report.json").exists()
    assert command(way, tmp_path / "out") == 0
    assert f"going on from iteration {steps // 3 + 4}" in capsys.readouterr().out
    assert content(tmp_path / "out") == content(undisturbed / way)
    assert not (tmp_path / "out" / UNFINISHED).exists()


class Crash(BaseException):
    pass


@pytest.mark.parametrize(("flags", "from_step"), [([], 0), (["--save-interval", 2], 2)], ids=["epochs", "steps"])
def test_a_run_that_dies_goes_on_from_its_last_checkpoint_bitwise(flags, from_step, command, undisturbed, tmp_path,
                                                                  monkeypatch, capsys):
    an_epoch = report_of(undisturbed / "whole")["iterations"] // 3

    def die():
        raise Crash

    with monkeypatch.context() as patch:
        after_steps(an_epoch + 4, patch, die)
        with pytest.raises(Crash):
            command("whole", tmp_path / "out", *flags)
    last = an_epoch + from_step + (2 - an_epoch % 2 if from_step and an_epoch % 2 else 0)
    assert command("whole", tmp_path / "out", *flags) == 0
    assert f"going on from iteration {last}" in capsys.readouterr().out
    assert content(tmp_path / "out") == content(undisturbed / "whole")


def test_a_training_that_an_older_version_began_goes_on_and_is_chosen_by_what_it_was(command, undisturbed, tmp_path,
                                                                                     monkeypatch, capsys):
    """It stored the value of the kind's first metric alone."""
    flags = ["head", tmp_path / "out", "--class-weights", "balanced"]
    validations = [record for record in content_of_metrics(undisturbed / "head") if record["kind"] == "valid"]
    stop = validations[0]["iteration"] + 1
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "state", lambda self: {
            "iteration": self.iteration, "epoch": self.epoch, "step": self.step, "best_at": self.best_at,
            "best_epoch": self.best_epoch, "best_value": self.best_values[0] if self.best_values else None})
        patch.setattr(Progress, "chooser", lambda *_: "accuracy")
        assert command(*flags, "--exit-interval", stop) == 0
    capsys.readouterr()
    assert command(*flags) == 0
    assert f"going on from iteration {stop}" in capsys.readouterr().out
    assert report_of(tmp_path / "out")["chosen_by"] == "accuracy"


def test_a_seed_that_dies_behind_its_last_step_takes_none_again(command, undisturbed, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(training.FineTuning, "report", lambda self: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            command("head", tmp_path / "out")
    after_steps(1, monkeypatch, lambda: pytest.fail("all steps are taken"))
    assert command("head", tmp_path / "out") == 0
    (tmp_path / "out" / UNFINISHED).mkdir()  # as where it dies while it takes that away
    assert command("head", tmp_path / "out") == 0 and not (tmp_path / "out" / UNFINISHED).exists()
    assert content(tmp_path / "out") == content(undisturbed / "head")


def test_a_seed_that_dies_between_its_model_and_its_report_leaves_no_second_model(command, undisturbed, tmp_path,
                                                                                  monkeypatch, capsys):
    out = tmp_path / "out"
    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(training, "write_json", lambda *_: (_ for _ in ()).throw(Crash))
            command("head", out)
    (before,) = iterations(out).values()
    assert command("head", out) == 0
    assert "abandoned" not in capsys.readouterr().out and not list(out.glob("abandoned-*"))
    assert [*iterations(out).values()] == [before] and content(out) == content(undisturbed / "head")


def test_a_model_of_another_training_is_not_replaced(command, undisturbed, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(undisturbed / "head", out)
    (out / "report.json").unlink()
    assert command("head", out, "--pooling", "cls") == 0
    assert len(iterations(out)) == 1 == len(list(out.glob("abandoned-1-iter_*")))


def test_a_beginning_of_another_run_is_not_gone_on_from(command, tmp_path, capsys):
    assert command("head", tmp_path / "out", "--exit-interval", 2) == 0
    assert command("head", tmp_path / "out", "--pooling", "cls") == 2
    assert "holds the beginning of another run: --pooling is cls, it was mean before" in capsys.readouterr().err
    assert command("head", tmp_path / "out", "--global-batch-size", 4) == 2
    assert "--global-batch-size is 4, it was 2 before; to go on with that give what it had" in capsys.readouterr().err


def test_a_run_goes_on_in_another_layout_and_is_done_for_all_of_them(base, data, tmp_path, capsys):
    """As where memory ran out: other micro-batches, recomputation, ranks."""
    flags = ["own", "--load", base, "--data", data, "--train-iters", 8, "--global-batch-size", 4, "--head-dropout", 0,
             "--hidden-dropout", 0, "--attention-dropout", 0, "--bootstrap", 0, "--log-interval", 1]
    assert finetune(*flags, "--save", tmp_path / "alone") == 0
    out = tmp_path / "out"
    launch = [sys.executable, "-m", "megatron.parallel.launch", "--nproc-per-node", "2", "tools/finetune.py"]
    subprocess.run([*launch, *map(str, flags), "--save", str(out), "--tensor-model-parallel-size", "2",
                    "--exit-interval", "3"], cwd=ROOT, check=True, capture_output=True)
    capsys.readouterr()
    assert finetune(*flags, "--save", out, "--checkpoint-activations", "--micro-batch-size", 1) == 0
    said = capsys.readouterr().out
    assert f"going on from iteration 3 in {out / UNFINISHED}" in said
    assert "note: --micro-batch-size is 1, it was 2 before: dropout masks differ" in said
    losses, alone = ([record["loss"] for record in content(folder)[2] if record["kind"] == "train"]
                     for folder in (out, tmp_path / "alone"))
    assert len(losses) == 8 and losses == pytest.approx(alone, rel=1e-5)
    assert finetune(*flags, "--save", out) == 0 and "seed 1234 is done already" in capsys.readouterr().out


def test_a_rate_that_was_chosen_is_not_looked_for_again(base, data, tmp_path, capsys):
    flags = ["own", "--load", base, "--data", data, "--save", tmp_path / "out", "--train-iters", 3, "--calibrate-lr",
             1e-6, 1e-2, "--bootstrap", 0]
    assert finetune(*flags, "--exit-interval", 2) == 0
    assert "learning rate 0.01" in capsys.readouterr().out
    assert finetune(*flags) == 0
    said = capsys.readouterr().out
    assert "learning rate 0.01" not in said and "going on from iteration 2" in said
    assert report_of(tmp_path / "out")["lr"] == 0.01


def test_a_run_that_is_unfinished_predicts_nothing(command, tmp_path, capsys):
    assert command("head", tmp_path / "out", "--exit-interval", 2) == 0
    capsys.readouterr()
    assert "holds no checkpoint, which" in refusal(capsys, "predict", tmp_path / "out", "x.fasta", tmp_path / "x.csv")


def test_a_run_keeps_the_precision_that_auto_was_when_it_began(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(precision, "gain_of_bf16", lambda *_: 2.0)
    assert command("head", tmp_path / "out", "--precision", "auto", "--exit-interval", 2) == 0
    monkeypatch.setattr(precision, "gain_of_bf16", lambda *_: 0.5)
    assert command("head", tmp_path / "out", "--precision", "auto") == 0
    first, second = (line for line in capsys.readouterr().out.splitlines() if line.startswith("precision: "))
    assert "2.00 times as fast" in first and second == "precision: bf16; as in the run that is resumed"
    assert command("head", tmp_path / "out", "--precision", "auto") == 0
    assert "precision: bf16; as in the run that is resumed" in capsys.readouterr().out
