"""wandb, trackio and mlflow (`--logger`): a thread for each sends the records, so that no step waits for a network.

A resumed run continues its run there, whose id is kept in SAVE/trackers.json; to begin another one, remove that file.
The libraries' own environment variables say where they send data and with which credentials.
"""

import json
import queue
import re
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.errors import ConfigError
from megatron.files import write_json
from megatron.train.observation.observers import Record

KEYS = "trackers.json"
PROJECT = "proteinlm"  # where neither a flag nor the library's environment names one
OPENING_S = 120.0  # the start of a run waits at most this long for a library
CLOSING_S = 60.0  # the end of a run waits at most this long for records that are not sent yet
_PARAMETERS_AT_ONCE = 100  # mlflow's limit


@dataclass(frozen=True)
class TrackedRun:
    """A run to be opened in a library."""

    folder: Path | None  # --save
    name: str | None  # for people
    project: str | None
    parameters: Mapping[str, Any]  # all flags
    key: str | None  # the library's id of the run, if an earlier start has begun it


@dataclass(frozen=True)
class Remote:
    """An open run of a library."""

    key: str  # the library's id of the run
    send: Callable[[int, Mapping[str, float]], Any]  # of an iteration, values by their names
    finish: Callable[[bool], Any]  # True: the run ended by an error


class Tracker:
    """An observer that sends records to a library in order, from a thread; logs the first failure alone.

    `remote`: None where the library has failed already, and nothing is sent.
    """

    def __init__(self, name: str, remote: Remote | None, tell: Callable[[str], None]) -> None:
        self._name, self._remote, self._tell, self._has_told = name, remote, tell, False
        self._jobs: queue.SimpleQueue[Callable[[Remote], Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"--logger {name}", daemon=True)
        self._thread.start()

    def record(self, record: Record) -> None:
        """Have the thread send the record's numbers, each named KIND/NAME."""
        values = {f"{record['kind']}/{name}": float(value) for name, value in record.items()
                  if name not in ("kind", "iteration") and not isinstance(value, list | None)}
        self._jobs.put(lambda remote: remote.send(record["iteration"], values))

    def close(self, has_failed: bool) -> None:
        """Finish the run there, waiting up to CLOSING_S seconds for records that are not sent yet."""
        self._jobs.put(lambda remote: remote.finish(has_failed))
        self._jobs.put(None)
        self._thread.join(CLOSING_S)
        if self._thread.is_alive():
            self.note(f"has not taken everything {CLOSING_S:.0f} s after the end")

    def note(self, what: str) -> None:
        """Log a note, but only the first time."""
        if not self._has_told:
            self._has_told = True
            self._tell(f"note: --logger {self._name} {what}; metrics.jsonl has all numbers")

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if self._remote is not None:
                    job(self._remote)
            except Exception as error:  # whatever a library or the network raises
                self.note(f"did not take a record ({_in_short(error)}); training goes on")


def tracker(name: str, save: str | None, project: str | None, parameters: Mapping[str, Any],
            tell: Callable[[str], None]) -> Tracker:
    """The tracker of library `name`, with its run there begun, or continued.

    Raises ConfigError if that fails; for a run that an earlier start had begun there, a failure is only logged.
    """
    folder = None if save is None else Path(save).resolve()
    keys = {} if folder is None else _read_keys(folder / KEYS)
    asked = TrackedRun(folder, None if folder is None else folder.name, project, parameters, keys.get(name))
    try:
        remote = _opened(name, asked)
    except Exception as error:  # not logged in, no such server, no network, a file that cannot be written, …
        if asked.key is None:
            raise ConfigError(f"--logger {name} could not begin a run ({_in_short(error)}); mend that, or leave it "
                              "out") from error
        gone = Tracker(name, None, tell)
        gone.note(f"could not go on with its run {asked.key} ({_in_short(error)}); training goes on without it")
        return gone
    begun = Tracker(name, remote, tell)
    if folder is not None and remote.key != asked.key:
        try:
            write_json(folder / KEYS, keys | {name: remote.key})
        except OSError as error:
            begun.note(f"cannot keep the name of its run in {folder / KEYS} ({error.strerror or error}): a later start "
                       "begins another there")
    return begun


def _opened(name: str, asked: TrackedRun) -> Remote:
    """The run opened in library `name`; raises whatever the library does, or TimeoutError, since other ranks wait."""
    answers = queue.SimpleQueue[Remote | Exception]()

    def ask() -> None:
        try:
            answers.put(_OPEN[name](asked))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, name=f"--logger {name} begins", daemon=True).start()
    try:
        answer = answers.get(timeout=OPENING_S)
    except queue.Empty:
        raise TimeoutError(f"no answer in {OPENING_S:.0f} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _wandb(asked: TrackedRun) -> Remote:
    import wandb

    theirs, key = wandb.setup().settings, asked.key or uuid.uuid4().hex[:8]
    settings = {"finish_timeout": CLOSING_S} if "finish_timeout" in getattr(wandb.Settings, "model_fields", ()) else {}
    run = wandb.init(id=key, resume="allow", project=asked.project or theirs.project or PROJECT,
                     name=theirs.run_name or asked.name, dir=asked.folder, settings=wandb.Settings(**settings))
    run.config.update(dict(asked.parameters), allow_val_change=True)
    run.define_metric("iteration")  # wandb's own step cannot go back, as a run may
    run.define_metric("*", step_metric="iteration")
    return Remote(key, lambda iteration, values: run.log({"iteration": iteration, **values}),
                  lambda has_failed: run.finish(exit_code=int(has_failed)))


def _trackio(asked: TrackedRun) -> Remote:
    import trackio

    key = asked.key or f"{asked.name or PROJECT}-{uuid.uuid4().hex[:8]}"  # trackio finds runs by their name alone
    run = trackio.init(project=asked.project or PROJECT, name=key, resume="allow", embed=False,
                       config={name: _plain(value) for name, value in asked.parameters.items()})
    return Remote(key, lambda iteration, values: run.log(dict(values), step=iteration), lambda has_failed: run.finish())


def _mlflow(asked: TrackedRun) -> Remote:
    import mlflow
    from mlflow.entities import Metric, Param

    if not mlflow.is_tracking_uri_set() and asked.folder is not None:
        (asked.folder / "mlflow").mkdir(exist_ok=True)
        mlflow.set_tracking_uri(f"sqlite:///{asked.folder / 'mlflow' / 'mlflow.db'}")
    client = mlflow.MlflowClient()
    if asked.key is None:
        name = asked.project or mlflow.environment_variables.MLFLOW_EXPERIMENT_NAME.get() or PROJECT
        experiment = client.get_experiment_by_name(name)
        number = client.create_experiment(name) if experiment is None else experiment.experiment_id
        run = client.create_run(number, run_name=asked.name)
    else:
        run = client.get_run(asked.key)
        client.update_run(asked.key, status="RUNNING")
    key = run.info.run_id
    new = [Param(name, str(value)) for name, value in asked.parameters.items() if name not in run.data.params]
    for first in range(0, len(new), _PARAMETERS_AT_ONCE):  # only new ones: mlflow's parameters cannot be changed
        client.log_batch(key, params=new[first:first + _PARAMETERS_AT_ONCE])

    def send(iteration: int, values: Mapping[str, float]) -> None:
        now_ms = int(1000 * values[next(name for name in values if name.endswith("/written_s"))])
        client.log_batch(key, metrics=[Metric(re.sub(r"[^\w\-. :/]", "_", name), value, now_ms, iteration)
                                       for name, value in values.items()])

    return Remote(key, send, lambda has_failed: client.set_terminated(key, "FAILED" if has_failed else "FINISHED"))


_OPEN: Mapping[str, Callable[[TrackedRun], Remote]] = {"wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow}


def _read_keys(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _in_short(error: Exception) -> str:
    """The error's type and the first line of its text, at most 200 characters."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
