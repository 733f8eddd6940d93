"""What a sweep keeps in its folder, so that it goes on after it was killed, and what became of each trial.

FOLDER/sweep.json     what it is: the flags of all trials, which flags are varied
FOLDER/sweep.jsonl    one line a trial, begun or ended
FOLDER/sweep.csv      the same as a table
FOLDER/lr=1e-3_seed=1 one trial: the folder of its run, and run.log, what that printed
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
from megatron.study.curves import kinds_of
from megatron.study.settings import Space, Trial

BEGUN, FINISHED, STOPPED, NOT_FINITE, FAILED = "begun", "finished", "stopped early", "not finite", "failed"
ENDED = (FINISHED, STOPPED, NOT_FINITE)  # is not tried again
IDENTITY, RESULTS = "sweep.json", "sweep.jsonl"
_SAID = {"flags": "its trials have", "varied": "it varies"}
WAIT_S = 60.0  # for a trial of a sweep that was killed, which is still saving


@dataclass(frozen=True)
class TrialResult:
    """What is known of a trial: the loss at its last evaluation, and what it took up to there."""

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
    """The results in a sweep's folder, by their trials; what is put in is on the disk at once.

    `metric`: the loss that they have. Those of an earlier start, which may have gone by another, are read again.
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
        """Every result, in the order in which the trials were begun."""
        return list(self._results.values())

    def begun(self, trial: Trial) -> TrialResult:
        """A result to be filled in; that of an earlier start, if there is one."""
        return self[trial] or TrialResult(self._space.folder_name(trial),
                                          dict(zip(self._space.names, trial.setting, strict=True)), trial.seed)

    def put(self, result: TrialResult) -> None:
        """Keep a result, in place of what was known of its trial."""
        self._results[result.trial] = result
        write_text(self._path, "".join(f"{json.dumps(asdict(one))}\n" for one in self.all()))

    def facts(self, trial: str) -> dict[str, Any]:
        """The loss and the totals of a trial's last evaluation; {} before it."""
        last = self._last(trial)
        return {} if last is None else {
            "loss": last.get("loss"), "steps": last["iteration"], "residues": last.get("consumed_residues"),
            "seconds": last.get("training_s"), "flops": last.get("consumed_flops")}

    def measured_on(self) -> set[str | None]:
        """The digests of what the last evaluations of the trials are of."""
        return {last.get(MEASURED_ON) for trial in self._results if (last := self._last(trial)) is not None}

    def _last(self, trial: str) -> dict[str, Any] | None:
        """The record of a trial's last evaluation; None before it."""
        with suppress(ConfigError):
            return next(reversed(kinds_of(self.folder / trial).get(self._metric, [])), None)
        return None

    def _read_again(self, result: TrialResult) -> TrialResult:
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
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
            return [TrialResult(**json.loads(line)) for line in lines]
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{self._path} is damaged ({error}); remove it: trials that are done end at once when "
                              "started again") from None

    def _check_identity(self, identity: dict[str, Any]) -> None:
        """Raises ConfigError where another sweep's trials have got anywhere here; writes there what this one is."""
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
    """What two lists of words have from the flag on in which they first differ, in short."""
    pair = [[one] if isinstance(one, str) else list(one) for one in (then, now)]
    alike = next((index for index, words in enumerate(zip(*pair, strict=False)) if words[0] != words[1]),
                 min(map(len, pair)))
    if alike and any(words[alike:] and not words[alike].startswith("--") for words in pair):
        alike -= 1  # a value: with its flag, if that is what stands before it
    return [" ".join(words[alike:alike + 4]) + (" …" if len(words) > alike + 4 else "") for words in pair]


@contextmanager
def held(folder: Path, tell: Callable[[str], None]) -> Iterator[IO[str]]:
    """The folder for this sweep alone: a file that trials inherit, so that it is free once all have ended.

    Raises ConfigError where it is of something else, another sweep holds it, or trials are still at work after a while.
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
