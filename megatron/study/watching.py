"""Shows the state of a run from the files in its folder, while it is running or later; needs no PyTorch."""

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.checkpoint.claim import LOCK, is_held
from megatron.checkpoint.metrics import evaluations_of, read_records
from megatron.checkpoint.places import BEST, CONFIG_FILE, METRICS_FILE, SPIKES, STATE, iterations, validation_loss
from megatron.config.reading.files import read_file
from megatron.config.reading.presets import PRESETS
from megatron.errors import ConfigError
from megatron.log import in_time
from megatron.study.table import in_short
from megatron.study.text_plot import MARK, Point, text_plot

_PATIENCE_S, _PATIENCE = 60.0, 10  # a run is silent after so many seconds, and so many log intervals, without a record
_BAR = 24  # characters


@dataclass(frozen=True)
class View:
    """A run as its folder shows it at the time `now_s`."""

    folder: Path
    records: list[dict[str, Any]]  # all of metrics.jsonl
    num_iterations: int | None  # of the whole run, if known
    is_held: bool | None  # as `claim.is_held`: True: a process is running; False: it died; None: it ended
    written_s: float  # when metrics.jsonl was last written, in seconds since 1970
    now_s: float

    @property
    def train(self) -> list[dict[str, Any]]:
        """The records of training."""
        return [record for record in self.records if record["kind"] == "train"]

    @property
    def iteration(self) -> int:
        """The step of the newest record or, if the run has ended, of a later checkpoint; 0 if there is neither."""
        saved = iterations(self.folder) if self.is_held is None else {}  # a run may be stopped between two log lines
        return max([*(record["iteration"] for record in self.records), *saved], default=0)

    def state(self) -> str:
        """The state of the run in words, such as "running" or "finished"."""
        if self.is_held is False:
            return "died: its process is gone without a word"
        if self.is_held is None:
            is_done = self.num_iterations is not None and self.iteration >= self.num_iterations
            return "finished" if is_done else "stopped"
        if not self.records:
            return "starting"
        silent_s = self.now_s - self.written_s
        times_s = [record["written_s"] for record in self.train[-2:] if "written_s" in record]
        usual_s = times_s[1] - times_s[0] if len(times_s) == 2 else 0.0
        if silent_s < max(_PATIENCE_S, _PATIENCE * usual_s):
            return "running"
        return f"silent since {time.strftime('%H:%M', time.localtime(self.written_s))} ({in_time(silent_s)})"


def look(folder: Path, now_s: float) -> View:
    """The run in a folder as it is now; raises ConfigError if there is none."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is {'no folder' if folder.exists() else 'not there'}; give the folder that a run "
                          "is saved in (--save)")
    metrics = folder / METRICS_FILE
    if not any((folder / name).exists() for name in (METRICS_FILE, CONFIG_FILE, LOCK)):
        inside = sorted(place.parent for place in folder.glob(f"*/{METRICS_FILE}"))
        remedy = f"give one of those in it, such as {inside[0]}" if inside else (
            "give the folder that a run is saved in (--save)")
        raise ConfigError(f"{folder} holds no run; {remedy}")
    records, written_s = [], now_s
    with suppress(FileNotFoundError):
        records, written_s = read_records(metrics), metrics.stat().st_mtime
    return View(folder, records, _num_iterations(folder, records), is_held(folder), written_s, now_s)


def frame(view: View, width: int, height: int, is_plain: bool = False) -> list[str]:
    """The view as at most `height` lines of at most `width` characters; `is_plain`: in ASCII."""
    told = [f"{view.folder.resolve().name}: {view.state()}", _progress(view),
            *(f"{name:<12}{value}" for name, value in _rows(view) if value)]
    train, valid = (_points(view.records, kind) for kind in ("train", "valid"))
    plot = text_plot(train, valid, width, height - len(told) - 2, is_plain)
    head = [f"{'':12}loss in training{f', {MARK} on validation' if valid else ''}"] if plot else []
    return [line[:width] for line in [*told, "", *head, *plot][:height]]


def _num_iterations(folder: Path, records: Sequence[dict[str, Any]]) -> int | None:
    """The number of steps of the run, from its records or, before the first, its configuration; None if unknown."""
    known = [record["num_iterations"] for record in records if "num_iterations" in record]
    if known:
        return known[-1]
    with suppress(ConfigError):
        return read_file(folder / CONFIG_FILE, PRESETS).get("train_iters")
    return None


def _points(records: Sequence[dict[str, Any]], kind: str) -> list[Point]:
    """The (step, loss) of a kind of record, where the loss is finite."""
    points = {record["iteration"]: record.get("loss") for record in evaluations_of(records, kind)[0]}
    return [(step, loss) for step, loss in sorted(points.items())
            if isinstance(loss, int | float) and math.isfinite(loss)]


def _progress(view: View) -> str:
    """The line with the progress bar."""
    if view.num_iterations is None:
        return f"step {view.iteration:,}"
    share = min(1.0, view.iteration / max(1, view.num_iterations))
    bar = "#" * int(share * _BAR)
    left_s = (view.train[-1].get("time_left_s") or 0.0) - (view.now_s - view.written_s) if view.train else 0.0
    said = f", {in_time(left_s)} left" if view.is_held and left_s > 0 else ""
    return f"step {view.iteration:,} of {view.num_iterations:,} [{bar:-<{_BAR}}] {100 * share:.0f} %{said}"


def _rows(view: View) -> list[tuple[str, str]]:
    """The lines below the progress bar, as (name, text); the text is empty if nothing is known."""
    last = view.train[-1] if view.train else {}
    known: dict[str, Any] = {name: value for name, value in last.items() if isinstance(value, int | float)}
    texts = {"loss": "{:.4f}".format, "residues_per_s": in_short, "consumed_residues": in_short, "training_s": in_time}
    known |= {name: form(known[name]) for name, form in texts.items() if name in known}
    if "loss" in last:
        known.setdefault("loss", "not finite")

    def said(**forms: str) -> str:
        """The values that are known, in these forms by name."""
        return ", ".join(form.format(known[name]) for name, form in forms.items() if name in known)

    return [
        ("loss", said(loss="{}", perplexity="{:.2f} perplexity", masked_accuracy="{:.1%} predicted right")),
        ("validation", _validation(view)),
        ("speed", said(residues_per_s="{} residues/s", model_tflops="{:.3f} TFLOP/s", share_of_peak="{:.0%} of peak")),
        ("memory", said(memory_gib="{:.2f} GiB on the fullest rank",
                        num_ranks="{:d} rank" if known.get("num_ranks") == 1 else "{:d} ranks")),
        ("rate", said(learning_rate="{:.3E}", grad_norm="{:.3f} norm of the gradient",
                      global_batch_size="{:,d} rows a step")),
        ("so far", said(training_s="{}", consumed_residues="{} residues")),
        ("checkpoint", _checkpoint(view)),
        ("wrong steps", _wrong_steps(view)),
        ("last record", f"{in_time(max(0.0, view.now_s - view.written_s))} ago" if view.records else ""),
    ]


def _validation(view: View) -> str:
    found, num_others = evaluations_of(view.records, "valid")
    latest = max((record["iteration"] for record in found if "loss" in record), default=0)
    others = f"; {num_others:,} before on other data" if num_others else ""
    points = _points(view.records, "valid")
    if not points:
        return f"not finite at step {latest:,}{others}" if latest else ""
    step, loss = points[-1]
    best_step, best = min(points, key=lambda point: point[1])
    if step < latest:
        return f"not finite at step {latest:,}, best {best:.4f} at {best_step:,.0f}{others}"
    of_best = f"best {best:.4f} at {best_step:,.0f}" if best < loss else "the best"
    return f"{loss:.4f} at step {step:,.0f}, {of_best}{others}"


def _checkpoint(view: View) -> str:
    places = list(iterations(view.folder).values())
    ages_s = {}
    for place in places:
        with suppress(OSError):  # a checkpoint may be removed meanwhile
            ages_s[place] = view.now_s - (place / STATE).stat().st_mtime
    if not ages_s:
        return "none yet" if not places else ""
    newest = min(ages_s, key=lambda place: ages_s[place])
    best = (view.folder / BEST).resolve()
    loss = validation_loss(best)
    told = f", best {best.name} ({loss:.4f})" if loss is not None else ""
    return f"{newest.name}, {in_time(max(0.0, ages_s[newest]))} old{told}"


def _wrong_steps(view: View) -> str:
    files = sorted((view.folder / SPIKES).glob("step_*.tsv"))
    skipped = sum(record.get("skipped_iterations") or 0 for record in view.train)
    last = f", last {int(files[-1].stem.removeprefix('step_')):,}" if files else ""
    return f"{len(files):,}{last}, {skipped:,} skipped" if view.train else ""
