"""Trackers and Prometheus receive a run's numbers and cannot stop it; stand-ins play the libraries."""

import re
import socket
import sys
import threading
import urllib.error
import urllib.request
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

from megatron.config import CheckpointConfig, LoggingConfig
from megatron.errors import ConfigError
from megatron.log import Log
from megatron.train.observation import trackers
from megatron.train.observation.events import Events, TrainingFacts
from megatron.train.observation.prometheus import Exposition, Prometheus
from megatron.train.observation.trackers import tracker
from megatron.train.step.evaluate import Evaluation
from megatron.train.step.meters import Reading, Totals

FLAGS = {"lr": 1e-3, "data_path": ("a", "b"), "save": None}
TRAIN = {"kind": "train", "iteration": 7, "written_s": 1.5, "loss": 2.5, "share_of_peak": None}
VALID = {"kind": "valid/a+b", "iteration": 7, "written_s": 2.0, "loss": 2.75}


class Library:
    """What a library was told, whichever it is: of each start its key, flags, records, and how it ended."""

    def __init__(self):
        self.starts, self.broken, self.gate = [], None, None

    def begin(self, key):
        if self.broken is not None:
            raise self.broken
        self.starts.append(SimpleNamespace(key=key, flags={}, records=[], ended=None, project=None, name=None))
        return self.starts[-1]

    def take(self, iteration, values):
        if self.gate is not None:
            self.gate.wait()
        if self.broken is not None:
            raise self.broken
        self.starts[-1].records.append((iteration, dict(values)))

    def finish(self, how):
        self.starts[-1].ended = how


def wandb_of(library):
    def init(id, resume, project, name, dir, settings):
        start = library.begin(id)
        start.project, start.name, start.values = project, name, {}
        assert resume == "allow"
        config = SimpleNamespace(update=lambda flags, allow_val_change: start.flags.update(flags))
        return SimpleNamespace(config=config, define_metric=lambda name, step_metric=None: None,
                               log=lambda values: library.take(values["iteration"], {
                                   name: value for name, value in values.items() if name != "iteration"}),
                               finish=lambda exit_code: library.finish(exit_code == 0))

    settings = SimpleNamespace(project=None, run_name=None)
    return {"wandb": {"init": init, "setup": lambda: SimpleNamespace(settings=settings), "Settings": dict}}


def trackio_of(library):
    def init(project, name, resume, embed, config):
        start = library.begin(name)
        start.project, start.flags, start.name = project, config, name.rsplit("-", 1)[0]
        assert resume == "allow"
        return SimpleNamespace(log=lambda values, step: library.take(step, values),
                               finish=lambda: library.finish(None))

    return {"trackio": {"init": init}}


def mlflow_of(library):
    """Like the real one, its client refuses a parameter that changes and a name with a +, and takes 100 at once."""
    class Client:
        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name):
            return name

        def create_run(self, experiment, run_name):
            start = library.begin("made by mlflow")
            start.project, start.name = experiment, run_name
            return SimpleNamespace(info=SimpleNamespace(run_id=start.key), data=SimpleNamespace(params={}))

        def get_run(self, key):
            before = library.starts[-1].flags
            library.begin(key).flags = before
            return SimpleNamespace(info=SimpleNamespace(run_id=key), data=SimpleNamespace(params=before))

        def update_run(self, key, status):
            assert status == "RUNNING"

        def log_batch(self, key, metrics=(), params=()):
            assert len(params) <= 100 and not {name for name, _ in params} & library.starts[-1].flags.keys()
            assert all(re.fullmatch(r"[/\w.\- :]+", metric[0]) for metric in metrics)
            library.starts[-1].flags.update(params)
            if metrics:
                assert {(at_ms, step) for _, _, at_ms, step in metrics} == {(metrics[0][2], metrics[0][3])}
                library.take(metrics[0][3], {name: value for name, value, *_ in metrics})

        def set_terminated(self, key, status):
            library.finish(status == "FINISHED")

    variable = SimpleNamespace(get=lambda: None)
    return {"mlflow": {"MlflowClient": Client, "is_tracking_uri_set": lambda: True,
                       "environment_variables": SimpleNamespace(MLFLOW_EXPERIMENT_NAME=variable)},
            "mlflow.entities": {"Metric": lambda *what: what, "Param": lambda *what: what}}


@pytest.fixture(params=["wandb", "trackio", "mlflow"])
def name(request):
    return request.param


@pytest.fixture
def library(name, monkeypatch):
    found = Library()
    for module, content in {"wandb": wandb_of, "trackio": trackio_of, "mlflow": mlflow_of}[name](found).items():
        stand_in = ModuleType(module)
        stand_in.__spec__ = ModuleSpec(module, None)
        vars(stand_in).update(content)
        monkeypatch.setitem(sys.modules, module, stand_in)
    return found


def told(found, *records, has_failed=False):
    for record in records:
        found.record(record)
    found.close(has_failed)


def test_a_library_gets_the_flags_and_each_record_at_its_step(name, library, tmp_path):
    told(tracker(name, str(tmp_path / "my-run"), None, FLAGS, pytest.fail), TRAIN, VALID)
    [start] = library.starts
    assert (start.project, start.name) == ("proteinlm", "my-run")
    assert {key: str(value) for key, value in start.flags.items()}.items() >= {"lr": "0.001", "save": "None"}.items()
    corpus = "valid/a_b" if name == "mlflow" else "valid/a+b"
    assert start.records == [(7, {"train/written_s": 1.5, "train/loss": 2.5}),
                             (7, {f"{corpus}/written_s": 2.0, f"{corpus}/loss": 2.75})]
    assert start.ended in (True, None)  # trackio does not ask how


@pytest.fixture(autouse=True)
def folder_of_the_run(tmp_path):
    (tmp_path / "my-run").mkdir()


def test_a_run_that_goes_on_does_so_in_its_run_there_with_flags_that_changed(name, library, tmp_path):
    many = FLAGS | {f"flag_{number}": number for number in range(150)}
    for flags, has_failed in ((many, True), (many | {"lr": 2.0, "new": 1}, False)):
        told(tracker(name, str(tmp_path / "my-run"), "mine", flags, pytest.fail), TRAIN, has_failed=has_failed)
    first, second = library.starts
    assert first.key == second.key and first.project == "mine"
    assert first.ended in (False, None) and second.ended in (True, None)
    assert str(second.flags["new"]) == "1" and str(second.flags["flag_149"]) == "149"


@pytest.mark.parametrize("name", ["wandb", "trackio"])  # mlflow itself makes the keys
def test_runs_without_a_folder_are_others_there(name, library):
    for _ in range(2):
        told(tracker(name, None, None, FLAGS, pytest.fail), TRAIN)
    assert library.starts[0].key != library.starts[1].key


def test_a_library_that_fails_is_noted_once_and_gets_what_comes_later(name, library, tmp_path):
    said = []
    found = tracker(name, str(tmp_path / "my-run"), None, FLAGS, said.append)
    library.broken = ConnectionError("no network\nand more")
    for _ in range(3):
        found.record(TRAIN)
    while not found._jobs.empty():
        pass
    found._jobs.put(lambda remote: setattr(library, "broken", None))
    told(found, VALID)
    assert said == [f"note: --logger {name} did not take a record (ConnectionError: no network); training goes on; "
                    "metrics.jsonl has all numbers"]
    assert [iteration for iteration, _ in library.starts[0].records] == [7]


def test_a_library_that_hangs_holds_up_neither_steps_nor_for_long_the_end(name, library, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "CLOSING_S", 0.02)
    said, library.gate = [], threading.Event()
    told(tracker(name, str(tmp_path / "my-run"), None, FLAGS, said.append), TRAIN, TRAIN)
    library.gate.set()
    assert len(said) == 1 and f"--logger {name} has not taken everything" in said[0]


def test_a_library_that_does_not_answer_at_the_start_is_not_waited_for_for_ever(name, tmp_path, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(trackers, "OPENING_S", 0.02)
    monkeypatch.setattr(trackers, "_OPEN", {name: lambda asked: gate.wait()})
    with pytest.raises(ConfigError, match=rf"--logger {name} could not begin a run \(TimeoutError: no answer in 0 s\)"):
        tracker(name, str(tmp_path / "my-run"), None, FLAGS, pytest.fail)
    gate.set()


def test_a_library_that_cannot_begin_ends_the_program_but_not_a_run_that_it_has_known(name, library, tmp_path):
    library.broken = ValueError("not logged in")
    with pytest.raises(ConfigError, match=rf"--logger {name} could not begin a run \(ValueError: not logged in\)"):
        tracker(name, str(tmp_path / "my-run"), None, FLAGS, pytest.fail)
    library.broken, said = None, []
    told(tracker(name, str(tmp_path / "my-run"), None, FLAGS, pytest.fail))
    library.broken = ValueError("not logged in")
    told(tracker(name, str(tmp_path / "my-run"), None, FLAGS, said.append), TRAIN)
    assert len(said) == 1 and "could not go on with its run" in said[0] and "training goes on" in said[0]


# --- Prometheus ---

SAMPLE = re.compile(r'([a-zA-Z_:][\w:]*)(?:\{((?:[a-z_]\w*="(?:[^"\\\n]|\\["\\n])*",?)*)\})? (\S+)')


def parsed(text):
    """The samples of an exposition by name and labels, each in its family; fails where Prometheus would."""
    samples, families, kind = {}, [], ""
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# HELP "):
            families.append(line.split(" ", 3)[2])
        elif line.startswith("# TYPE "):
            _, _, of, kind = line.split(" ")
            assert of == families[-1] and (kind == "counter") == of.endswith("_total") and kind in ("counter", "gauge")
        else:
            match = SAMPLE.fullmatch(line)
            assert match and match[1] == families[-1], line
            labels = {key: value.replace(r"\n", "\n").replace(r"\"", '"').replace(r"\\", "\\")
                      for key, value in re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', match[2] or "")}
            assert (match[1], frozenset(labels.items())) not in samples
            samples[match[1], frozenset(labels.items())] = float(match[3])
    assert len(families) == len(set(families))
    return samples


def at(text, name, **labels):
    return parsed(text).get((f"proteinlm_{name}", frozenset(labels.items())))


def exposition(*records, run=""):
    found = Exposition(run)
    for record in records:
        found.take(record)
    return found.text()


def test_numbers_are_told_in_the_units_that_prometheus_wants():
    text = exposition(TRAIN | {"model_tflops": 2.0, "memory_gib": 0.5, "residues_per_s": 10.0, "training_s": 4.0,
                               "consumed_samples": 12, "learning_rate": 0.1, "learning_rate_matrix": 0.2})
    assert at(text, "loss", kind="train") == 2.5
    assert at(text, "model_flops_per_second") == 2e12
    assert at(text, "memory_peak_bytes") == 2**29
    assert (at(text, "iterations_total"), at(text, "rows_total"), at(text, "training_seconds_total")) == (7, 12, 4)
    assert (at(text, "learning_rate"), at(text, "learning_rate", group="matrix")) == (0.1, 0.2)
    assert at(text, "last_record_timestamp_seconds") == 1.5
    assert at(text, "peak_flops_ratio") is None  # was not measured


def test_each_kind_keeps_its_newest_loss_and_skipped_steps_add_up():
    text = exposition(TRAIN | {"skipped_iterations": 1}, VALID, TRAIN | {"loss": float("nan"), "skipped_iterations": 2},
                      run='a "b"\\')
    assert at(text, "loss", run='a "b"\\', kind="valid/a+b") == 2.75
    loss = at(text, "loss", run='a "b"\\', kind="train")
    assert loss != loss  # a run that diverged says so
    assert at(text, "skipped_iterations_total", run='a "b"\\') == 3


def test_what_events_write_is_told_over_http_and_in_the_file_until_the_end(tmp_path):
    said = []
    shown = Prometheus(LoggingConfig(metrics_port=0, metrics_file=str(tmp_path / "run.prom")), str(tmp_path / "demo"),
                       said.append)
    [url] = re.findall(r"http://127\.0\.0\.1:\d+/metrics", said[0])
    events = Events(CheckpointConfig(), LoggingConfig(), Log(is_speaker=False), 0, [shown])
    reading = Reading(2, 2, 2.5, 0.1, 1.0, 0, 100, 110, 1e9, 0.5, [])
    events.train(reading, TrainingFacts(4, 8, 16, Totals(200, 1.0, 2e9), learning_rate=1e-3, group_rates={},
                                        global_batch_size=4, loss_scale=1.0, peak_flops=1e10, num_ranks=2,
                                        memory_gib=1.0, time_left_s=2.0))
    events.evaluation("test", 4, 16, None, Evaluation(2.75, 15.6, 0.2, 30))
    with urllib.request.urlopen(url, timeout=10) as answer:
        text, kind = answer.read().decode(), answer.headers["Content-Type"]
    assert kind == "text/plain; version=0.0.4; charset=utf-8" and text == (tmp_path / "run.prom").read_text()
    for name, value in {"iterations_total": 4, "last_iteration": 8, "residues_total": 200, "residues_per_second": 200,
                        "peak_flops_ratio": 0.2, "ranks": 2, "time_left_seconds": 2, "running": 1,
                        "failed": 0}.items():
        assert at(text, name, run="demo") == value, name
    assert at(text, "loss", run="demo", kind="test") == 2.75
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(url.replace("/metrics", "/etc/passwd"), timeout=10)
    shown.close(has_failed=True)
    text = (tmp_path / "run.prom").read_text()
    assert (at(text, "running", run="demo"), at(text, "failed", run="demo")) == (0, 1)
    with pytest.raises(OSError):
        urllib.request.urlopen(url, timeout=10)


def test_a_port_in_use_and_a_file_that_cannot_be_written_are_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--metrics-port {port} is in use on 127\.0\.0\.1; give another"):
            Prometheus(LoggingConfig(metrics_port=port), None, pytest.fail)
    with pytest.raises(ConfigError, match=r"--metrics-port 0 of --metrics-host 192\.0\.2\.1 cannot be listened at"):
        Prometheus(LoggingConfig(metrics_port=0, metrics_host="192.0.2.1"), None, pytest.fail)
    with pytest.raises(ConfigError, match="--metrics-file .* cannot be written"):
        Prometheus(LoggingConfig(metrics_file=str(tmp_path / "no" / "x.prom")), None, pytest.fail)


def test_a_file_that_can_no_longer_be_written_is_noted_once(tmp_path):
    said, folder = [], tmp_path / "there"
    folder.mkdir()
    shown = Prometheus(LoggingConfig(metrics_file=str(folder / "x.prom")), None, said.append)
    (folder / "x.prom").unlink()
    folder.rmdir()
    for _ in range(2):
        shown.record(TRAIN)
    assert len(said) == 1 and said[0].startswith("note: --metrics-file") and "training goes on" in said[0]
