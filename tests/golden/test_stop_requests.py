"""A request to stop is answered at any time, and leaves for later what it leaves undone."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.checkpoint.saving import Saver
from megatron.train import evaluations
from megatron.train.setup import run as build_module
from megatron.train.step.train_step import TrainStep
from tests.golden.training import ROOT, SHORT, free_port, losses, start_program


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


@pytest.mark.parametrize(("program", "number", "answer"), [
    ("pretrain_tape.py", signal.SIGTERM, (0, "stopped: there is nothing to save\n")),
    ("tools/embed.py", signal.SIGINT, (130, "stopped by Ctrl-C\n"))])
def test_a_request_while_a_rank_waits_for_another_to_start_is_answered(run, monkeypatch, program, number, answer):
    port = free_port()
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    # Without an answer, the rank ends by itself after half a minute, and says that the other has not come.
    flags = ["run", "in.fasta", "out.npz"] if program == "tools/embed.py" else [*SHORT, "--train-iters", "8"]
    process = subprocess.Popen([sys.executable, ROOT / program, *flags, "--distributed-timeout-minutes", "0.5"],
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    is_waiting = False
    while not is_waiting:
        assert process.poll() is None, process.communicate()[0]
        with socket.socket() as client:
            is_waiting = client.connect_ex(("127.0.0.1", port)) == 0
        time.sleep(0.05)
    start_s = time.monotonic()
    process.send_signal(number)
    output = process.communicate()[0]
    assert time.monotonic() - start_s < 20, output
    assert (process.returncode, output) == answer
