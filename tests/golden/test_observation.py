"""Short real runs that send their numbers to a tracker, played by a stand-in for trackio, and to Prometheus."""

import re
import socket
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

from pretrain_tape import main
from tests.golden.training import TINY, losses


@pytest.fixture
def told(monkeypatch):
    """The records that trackio gets: step, values; and what it was begun with."""
    records, begun = [], {}
    run = SimpleNamespace(log=lambda values, step: records.append((step, values)), finish=lambda: None)
    stand_in = ModuleType("trackio")
    stand_in.__spec__ = ModuleSpec("trackio", None)
    stand_in.init = lambda **what: begun.update(what) or run
    monkeypatch.setitem(sys.modules, "trackio", stand_in)
    return records, begun


@pytest.fixture
def unbuilt(monkeypatch):
    """The test fails where the program begins to build a run."""
    monkeypatch.setattr("megatron.train.rewinding.build", lambda *_: pytest.fail("built"))


def test_a_tracker_and_prometheus_get_what_metrics_jsonl_gets(corpus, tmp_path, told):
    records, begun = told
    assert main([*TINY, "--data-path", corpus, "--save", str(tmp_path / "run"), "--train-iters", "2", "--logger",
                 "trackio", "--metrics-file", str(tmp_path / "run.prom")]) == 0
    for kind in ("train", "valid", "test"):
        assert {step: values[f"{kind}/loss"] for step, values in records if f"{kind}/loss" in values} == (
            losses(tmp_path / "run", kind))
    assert (begun["project"], begun["config"]["num_layers"], begun["config"]["num_ranks"]) == ("proteinlm", 2, 1)
    text = (tmp_path / "run.prom").read_text()
    assert dict(re.findall(r'^proteinlm_(\w+)\{run="run"\} (\S+)$', text, re.MULTILINE)).items() >= {
        "iterations_total": "2.0", "last_iteration": "2.0", "ranks": "1.0", "running": "0.0",
        "failed": "0.0"}.items()


def test_a_library_that_is_not_installed_ends_the_program_with_status_2_before_anything_is_built(
        corpus, tmp_path, capsys, monkeypatch, unbuilt):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main([*TINY, "--data-path", corpus, "--save", str(tmp_path / "run"), "--train-iters", "2", "--logger",
                 "wandb"]) == 2
    assert capsys.readouterr().err == (
        "error: --logger wandb needs the package wandb, which is not installed: pip install wandb\n")


def test_a_port_in_use_ends_the_program_with_status_2_before_anything_is_built(corpus, tmp_path, capsys, unbuilt):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main([*TINY, "--data-path", corpus, "--save", str(tmp_path / "run"), "--train-iters", "2",
                     "--metrics-port", str(port)]) == 2
    said = f"error: --metrics-port {port} is in use on 127.0.0.1; give another, or 0 for one that is free\n"
    assert capsys.readouterr().err == said


def test_a_metrics_file_in_no_folder_ends_the_program_before_anything_is_built(corpus, tmp_path, capsys, unbuilt):
    assert main([*TINY, "--data-path", corpus, "--train-iters", "2", "--metrics-file", "/proc/none/run.prom"]) == 2
    assert capsys.readouterr().err.startswith("error: --metrics-file /proc/none/run.prom cannot be written (")


def test_a_start_that_is_refused_leaves_the_numbers_of_the_run_before_it(tmp_path, capsys):
    exposed = tmp_path / "run.prom"
    exposed.write_text("proteinlm_failed 1.0\n")
    assert main([*TINY, "--data-path", str(tmp_path / "nothing"), "--train-iters", "2", "--metrics-file", str(exposed),
                 "--metrics-port", "0"]) == 2
    assert exposed.read_text() == "proteinlm_failed 1.0\n" and list(tmp_path.iterdir()) == [exposed]
    capsys.readouterr()
