"""The record of a sweep in its folder: the result of each trial, so that a sweep that was killed can continue.

FOLDER/sweep.json     the sweep's identity: the flags of all trials, and which flags are varied; and the precision that
                      --precision auto means for all
FOLDER/sweep.jsonl    one line for each trial that was begun
FOLDER/sweep.csv      the same as a table
FOLDER/lr=1e-3_seed=1 one trial: the folder of its run, with its output in run.log
"""

import csv
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from megatron.checkpoint.metrics import MEASURED_ON
from megatron.checkpoint.places import METRICS_FILE, iterations
from megatron.config.command_line import as_flags
from megatron.errors import ConfigError
from megatron.files import try_lock, write_json, write_text
from megatron.study.curves import AXES, kinds_of
from megatron.study.settings import Setting, Space, Trial

BEGUN, FINISHED, STOPPED, NOT_FINITE, FAILED = "begun", "finished", "stopped early", "not finite", "failed"
ENDED = (FINISHED, STOPPED, NOT_FINITE)  # outcomes after which a trial is not run again
IDENTITY, RESULTS = "sweep.json", "sweep.jsonl"
_SAID = {"flags": "its trials have", "varied": "it varies"}
WAIT_S = 60.0  # how long to wait for trials of a killed sweep, which may still be saving


@dataclass(frozen=True)
class TrialResult:
    """What is known of a trial: its outcome, the loss at its last evaluation, and what it took up to there."""

    trial: str
    values: dict[str, str]
    seed: str | None
    outcome: str = BEGUN
    loss: float | None = None
    steps: int | None = None
    residues: float | None = None
    seconds: float | None = None
    flops: float | None = None
    wall_s: float | None = None
    note: str = ""


class SweepRecord:
    """The results in a sweep's folder, by trial; changes are written to the disk at once.

    `metric`: the kind of loss to record. Results of an earlier start, which may have used another metric, are read
    again from the trials' folders. Raises ConfigError if the folder holds another sweep.
    """

    def __init__(self, folder: Path, space: Space, metric: str) -> None:
        self.folder, self._space, self._metric = folder, space, metric
        self._path = folder / RESULTS
        self._results = {result.trial: result for result in self._read()}
        self._check_identity({"flags": as_flags(space.base), "varied": list(space.names)})
        self._results = {name: self._read_again(result) for name, result in self._results.items()}

    def __getitem__(self, trial: Trial) -> TrialResult | None:
        return self._results.get(self._space.folder_name(trial))

    def all(self) -> list[TrialResult]:
        """All results, in the order in which the trials were begun."""
        return list(self._results.values())

    def has_ended(self, trial: Trial) -> bool:
        """Whether a trial ended so that it is not run again."""
        result = self[trial]
        return result is not None and result.outcome in ENDED

    def is_left(self, setting: Setting) -> bool:
        """Whether a trial of a setting has not ended."""
        return not all(map(self.has_ended, self._space.trials(setting)))

    def begun(self, trial: Trial) -> TrialResult:
        """The result of a trial so far: that of an earlier start, else a new one."""
        return self[trial] or TrialResult(self._space.folder_name(trial),
                                          dict(zip(self._space.names, trial.setting, strict=True)), trial.seed)

    def put(self, result: TrialResult) -> None:
        """Write a result, replacing an earlier one of the same trial."""
        self._results[result.trial] = result
        write_text(self._path, "".join(f"{json.dumps(asdict(one))}\n" for one in self.all()))

    def facts(self, trial: str) -> dict[str, Any]:
        """The loss and the totals at a trial's last evaluation, as fields of TrialResult; {} if there is none yet."""
        last = self._last(trial)
        return {} if last is None else {"loss": last.get("loss"), **{name: last.get(key) for name, key in AXES.items()}}

    def measured_on(self) -> set[str | None]:
        """The digests of the data that the trials' last evaluations were measured on."""
        return {last.get(MEASURED_ON) for trial in self._results if (last := self._last(trial)) is not None}

    @property
    def precision(self) -> str | None:
        """What --precision auto means for all trials; None if it is not settled."""
        found: str | None = json.loads((self.folder / IDENTITY).read_text(encoding="utf-8")).get("precision")
        return found

    def settle_precision(self, chosen: str) -> None:
        """Write what --precision auto means for all trials."""
        identity = json.loads((self.folder / IDENTITY).read_text(encoding="utf-8"))
        write_json(self.folder / IDENTITY, {**identity, "precision": chosen})

    def _last(self, trial: str) -> dict[str, Any] | None:
        """The record of a trial's last evaluation; None if there is none yet."""
        with suppress(ConfigError):
            return next(reversed(kinds_of(self.folder / trial).get(self._metric, [])), None)
        return None

    def _read_again(self, result: TrialResult) -> TrialResult:
        """A result of an earlier start with the loss of this metric; raises ConfigError if it ended without one."""
        if not (self.folder / result.trial / METRICS_FILE).exists():
            return result
        facts = self.facts(result.trial) or {"loss": None}
        trial = Trial(tuple(result.values.values()), result.seed)
        if result.outcome in ENDED and facts.get("steps") == self._space.last_iteration(trial):
            return replace(result, **facts, outcome=FINISHED if facts["loss"] is not None else NOT_FINITE)
        if result.outcome == FINISHED:
            raise ConfigError(f"--metric {self._metric}: {self.folder / result.trial} ended without such a loss; give "
                              "another --metric")
        return replace(result, **facts)

    def write_table(self) -> None:
        """Write sweep.csv."""
        text = io.StringIO()
        columns = [*self._space.names, *(name for name in TrialResult.__dataclass_fields__ if name != "values")]
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        for result in self.all():
            facts: dict[str, Any] = asdict(result)
            writer.writerow(facts.pop("values") | facts)
        write_text(self.folder / "sweep.csv", text.getvalue())

    def _read(self) -> list[TrialResult]:
        """The results in sweep.jsonl; raises ConfigError if it is damaged."""
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
            return [TrialResult(**json.loads(line)) for line in lines]
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{self._path} is damaged ({error}); remove it: trials that are done end at once when "
                              "started again") from None

    def _check_identity(self, identity: dict[str, Any]) -> None:
        """Write the identity of this sweep; raises ConfigError if the folder holds results of another sweep."""
        path = self.folder / IDENTITY
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError:
            raise ConfigError(f"{path} is damaged; give a new folder") from None
        differing = next((name for name, value in identity.items() if found.get(name) != value), None)
        if differing is None:
            return
        if any(result.steps is not None or iterations(self.folder / result.trial) for result in self.all()):
            then, now = _difference(found.get(differing) or [], identity[differing])
            raise ConfigError(f"--output {self.folder} holds another sweep: {_SAID[differing]} {then or 'nothing'} "
                              f"where here is {now or 'nothing'}; give a new folder, or what it has")
        self._results = {}
        write_json(path, identity)


def _difference(then: Sequence[str] | str, now: Sequence[str] | str) -> list[str]:
    """For two lists of command-line words, an excerpt of each from the flag in which they first differ."""
    pair = [[one] if isinstance(one, str) else list(one) for one in (then, now)]
    alike = next((index for index, words in enumerate(zip(*pair, strict=False)) if words[0] != words[1]),
                 min(map(len, pair)))
    if alike and any(words[alike:] and not words[alike].startswith("--") for words in pair):
        alike -= 1  # a value differs: begin with its flag
    return [" ".join(words[alike:alike + 4]) + (" …" if len(words) > alike + 4 else "") for words in pair]


@contextmanager
def held(folder: Path, tell: Callable[[str], None]) -> Iterator[IO[str]]:
    """A context that holds the folder's lock, and gives its open file; trials inherit it, and hold the lock until they
    have ended.

    `tell` hears of waiting. Raises ConfigError if the folder holds something else than a sweep, or if another sweep or
    its trials still hold the lock after WAIT_S.
    """
    others = sorted(place.name for place in folder.glob("[!.]*"))
    if others and not (folder / IDENTITY).exists():
        raise ConfigError(f"--output {folder} holds {others[0]} and no sweep; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".sweep.lock").open("w") as file:
        began_s, is_told = time.monotonic(), False
        while not try_lock(file):
            if not is_told:
                tell(f"waiting for what is at work in {folder}: a trial of an earlier start may be saving")
                is_told = True
            if time.monotonic() >= began_s + WAIT_S:
                raise ConfigError(f"another sweep is at work in --output {folder}; wait for it, or give another "
                                  "folder")
            time.sleep(0.1)
        yield file
