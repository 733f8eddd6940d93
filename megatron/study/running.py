"""Runs the trials of a sweep as separate processes, and stops those that fall behind the others."""

import ctypes
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from megatron.checkpoint.places import METRICS_FILE, iterations
from megatron.errors import ConfigError, DivergedError
from megatron.log import in_time
from megatron.study.curves import read_curve
from megatron.study.record import BEGUN, FAILED, FINISHED, NOT_FINITE, STOPPED, SweepRecord, TrialResult
from megatron.study.settings import Space, Trial
from megatron.train.signals import requests_heard_by

PROGRAM = Path(__file__).resolve().parents[2] / "pretrain_tape.py"
LOG = "run.log"
POLL_S = 0.2
LEAST_OTHERS = 2  # fewer other trials have no meaningful median
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


@dataclass
class _Running:
    """A trial that is running."""

    trial: Trial
    result: TrialResult
    slot: int  # the index of its environment
    process: subprocess.Popen
    began_s: float
    num_seen: int = 0  # size of metrics.jsonl, in bytes, when it was last looked at
    judged_at: int | None = None  # the step of the last evaluation that was judged
    outcome: str | None = None  # its outcome, if this sweep has asked it to stop


class Sweep:
    """Runs trials, as many at once as there are `environments`, the environment variables of each slot.

    `early_stop`: the step from which on a trial that falls behind is stopped; None: no trial is stopped. `lock`: the
    descriptor that holds the folder's lock, which trials inherit. `tell`: prints a line of progress. `failed`: the
    results of trials that failed.
    """

    def __init__(self, space: Space, record: SweepRecord, metric: str, *, early_stop: int | None,
                 environments: Sequence[Mapping[str, str]], lock: int, tell: Callable[[str], None]) -> None:
        self._space, self._record, self._metric, self._early_stop = space, record, metric, early_stop
        self._environments, self._lock, self._tell = environments, lock, tell
        self._running: list[_Running] = []
        self._walls_s: list[float] = []
        self.failed: list[TrialResult] = []
        self._is_stopping = False

    def run(self, upcoming: Iterator[Trial], num_done: int, num_trials: int) -> bool:
        """Run the trials of `upcoming`; returns True when all have ended, False if a signal stopped the sweep.

        `num_done` of `num_trials` ended before. On SIGTERM, SIGINT and SIGUSR1 the running trials save and end. Raises
        ConfigError with the error message of a trial that ended because of a user's mistake.
        """
        with requests_heard_by(self._note):
            try:
                while True:
                    while not self._is_stopping and len(self._running) < len(self._environments):
                        if (trial := next(upcoming, None)) is None:
                            break
                        num_done += 1
                        self._tell(f"trial {num_done} of {num_trials}: {self._space.folder_name(trial)}")
                        self._begin(trial)
                    if not self._running:
                        return not self._is_stopping
                    time.sleep(POLL_S)
                    if self._is_stopping:
                        self._stop_all()
                    for running in list(self._running):
                        self._look(running, num_trials - num_done)
            finally:
                self._stop_all()
                for running in self._running:
                    running.process.wait()

    def _begin(self, trial: Trial) -> None:
        """Start the process of a trial, which resumes if its folder has a checkpoint."""
        result = replace(self._record.begun(trial), outcome=BEGUN, note="")
        self._record.put(result)
        folder = self._record.folder / result.trial
        folder.mkdir(exist_ok=True)
        words = [*self._space.words(trial), "--save", str(folder)]
        if "--finetune" not in words:
            words += ["--load", str(folder)]
        elif iterations(folder):  # else it begins with the weights of the flag --load
            words += ["--load", str(folder), "--no-finetune"]
        slot = min(set(range(len(self._environments))) - {running.slot for running in self._running})
        with (folder / LOG).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, str(PROGRAM), *words], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=os.environ | self._environments[slot], pass_fds=(self._lock,), preexec_fn=_die_with_parent)
        self._running.append(_Running(trial, result, slot, process, time.monotonic()))

    def _look(self, running: _Running, num_left: int) -> None:
        """Record a trial if it has ended, or stop it if it falls behind; `num_left`: trials that were not begun yet."""
        exit_status = running.process.poll()
        if exit_status is not None:
            self._running.remove(running)
            self._end(running, exit_status, num_left)
        elif self._early_stop is not None and running.outcome is None and self._has_grown(running):
            outcome = self._judged(running)
            if outcome is not None:
                self._stop(running, outcome)

    def _end(self, running: _Running, exit_status: int, num_left: int) -> None:
        """Record a trial that has ended; raises ConfigError if it ended because of a user's mistake."""
        wall_s = time.monotonic() - running.began_s
        self._walls_s.append(wall_s)
        facts = self._record.facts(running.result.trial)
        result = replace(running.result, **facts, wall_s=wall_s + (running.result.wall_s or 0.0))
        is_at_end = exit_status == 0 and result.steps == self._space.last_iteration(running.trial)
        said = _last_line(self._record.folder / result.trial / LOG)
        if is_at_end:
            result = replace(result, outcome=FINISHED if result.loss is not None else NOT_FINITE)
        elif exit_status == 0 and running.outcome is not None:
            result = replace(result, outcome=running.outcome)
        elif exit_status == DivergedError.exit_status:
            result = replace(result, outcome=NOT_FINITE)
        else:
            result = replace(result, outcome=FAILED, note=f"exit status {exit_status}: {said}")
            self.failed.append(result)
        self._record.put(result)
        self._tell(f"  {_in_words(result)}{self._time_left(num_left)}")
        if result.outcome == FAILED and exit_status in (0, 2):
            remedy = f"no {self._metric} loss at its end; give another --metric, or flags with which it has one"
            raise ConfigError(f"trial {result.trial}: {said.removeprefix('error: ') if exit_status else remedy}")

    def _has_grown(self, running: _Running) -> bool:
        """Whether a trial's metrics.jsonl has changed its size since the last call."""
        metrics = self._record.folder / running.result.trial / METRICS_FILE
        before, running.num_seen = running.num_seen, metrics.stat().st_size if metrics.exists() else 0
        return running.num_seen != before

    def _judged(self, running: _Running) -> str | None:
        """The outcome with which a trial is to be stopped now; None if it may go on."""
        facts = self._record.facts(running.result.trial)
        if not facts or facts["steps"] in (running.judged_at, self._space.last_iteration(running.trial)):
            return None
        running.judged_at = facts["steps"]
        if facts["loss"] is None:
            return NOT_FINITE
        others = [loss for result in self._record.all() if result.trial != running.result.trial
                  and (loss := self._loss_at(result, facts["steps"], like=running.result)) is not None]
        is_due = self._early_stop is not None and facts["steps"] >= self._early_stop
        return STOPPED if is_due and falls_behind(facts["loss"], others) else None

    def _loss_at(self, result: TrialResult, step: int, like: TrialResult) -> float | None:
        """The loss of a trial at exactly that step; None if it has none, or none on the data of the trial `like`."""
        with suppress(ConfigError):
            curve, other = (read_curve(self._record.folder / one.trial, self._metric) for one in (result, like))
            if curve.measured_on == other.measured_on:
                return next((float(loss) for loss, at in zip(curve.losses, curve.axes["steps"], strict=True)
                             if at == step), None)
        return None

    def _stop(self, running: _Running, outcome: str) -> None:
        running.outcome = outcome
        running.process.terminate()  # it saves, and leaves

    def _stop_all(self) -> None:
        for running in self._running:
            if running.outcome is None:
                self._stop(running, BEGUN)

    def _time_left(self, num_left: int) -> str:
        """How many trials are left and an estimate of their time, as the end of a line."""
        num_left += len(self._running)
        if not num_left:
            return ""
        seconds = statistics.mean(self._walls_s) * num_left / len(self._environments)
        return f"; {num_left} to go, about {in_time(seconds)}"

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._is_stopping = True


def falls_behind(loss: float, others: Sequence[float]) -> bool:
    """Whether a loss is worse than the median of the other trials' losses at the same step.

    This is the median stopping rule of Golovin et al., 2017 (doi 10.1145/3097983.3098043, section 3.2.2), but with the
    losses at one step in place of averages over all steps so far. False with fewer than LEAST_OTHERS others.
    """
    return len(others) >= LEAST_OTHERS and loss > statistics.median(others)


def _die_with_parent() -> None:
    """Make the kernel send SIGTERM to this process when its parent dies, even if the parent is killed."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGTERM)


def _in_words(result: TrialResult) -> str:
    """A line on how a trial ended."""
    loss = "no loss yet" if result.steps is None else f"loss {result.loss:.4f} at step {result.steps}" if (
        result.loss is not None) else f"loss not finite at step {result.steps}"
    outcome = "stopped; the same command goes on" if result.outcome == BEGUN else result.outcome
    return f"{outcome}{f' ({result.note})' if result.note else ''}: {loss}, in {in_time(result.wall_s or 0.0)}"


def _last_line(log: Path) -> str:
    """The last line of a program's output, or its error message if it ended with one."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines[-20:]) if line.startswith("error: ")), lines[-1] if lines else "")
