"""Reads loss curves from a run's metrics.jsonl, over steps, residues, seconds of training and FLOPs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.checkpoint.metrics import MEASURED_ON, evaluations_of, read_records
from megatron.checkpoint.places import METRICS_FILE
from megatron.errors import ConfigError

# The axes that a loss is drawn over, and their keys in records.
AXES = {"steps": "iteration", "residues": "consumed_residues", "seconds": "training_s", "flops": "consumed_flops"}


@dataclass(frozen=True)
class Curve:
    """Losses in nats at increasing steps, of one run or averaged over several."""

    losses: np.ndarray
    axes: dict[str, np.ndarray]  # by name, for each axis of AXES that was recorded, its value at each loss
    spread: np.ndarray | None = None  # for a mean of runs: the standard deviation of one run (over n - 1) at each point
    lost: tuple[int, ...] = ()  # steps after the last finite loss at which the loss was not finite
    measured_on: frozenset[str | None] = frozenset()  # digests of the data that the losses were measured on
    num_others: int = 0  # earlier evaluations that were left out, because they are on other data

    @property
    def last_step(self) -> int:
        """The last step with an evaluation, whether or not its loss was finite."""
        return self.lost[-1] if self.lost else int(self.axes["steps"][-1])

    @property
    def missing(self) -> list[str]:
        """The axes that were not recorded."""
        return [name for name in AXES if name not in self.axes]

    def best(self) -> int:
        """The index of the lowest loss."""
        return int(self.losses.argmin())

    def reached(self, loss: float) -> dict[str, float] | None:
        """The value on each axis where the curve first falls to `loss`, by linear interpolation; None if it never does.

        For a curve that begins below `loss`, it is the first point.
        """
        below = np.flatnonzero(self.losses <= loss)
        if not below.size:
            return None
        at = below[0]
        if at == 0:
            return {name: float(values[0]) for name, values in self.axes.items()}
        before, after = self.losses[at - 1], self.losses[at]
        share = (before - loss) / (before - after)
        return {name: float(values[at - 1] + share * (values[at] - values[at - 1]))
                for name, values in self.axes.items()}

    def smoothed(self) -> "Curve":
        """The curve as a centred running mean over a twentieth of the points, fewer towards the ends."""
        half, sums = len(self.losses) // 40, np.cumsum([0.0, *self.losses])
        index = np.arange(len(self.losses))
        reach = np.minimum(half, np.minimum(index, index[::-1]))
        return Curve((sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1), self.axes)


def read_curve(folder: Path, kind: str) -> Curve:
    """The finite losses of a kind of record ("train", "valid", "test", "valid/NAME") of the run in a folder.

    Raises ConfigError if there are none.
    """
    records = kinds_of(folder)
    evaluations, num_others = evaluations_of(records.get(kind, []), kind)
    latest = {record["iteration"]: record for record in evaluations if "loss" in record}
    found = {step: record for step, record in latest.items() if isinstance(record.get("loss"), float)}
    if not found:
        others = ", ".join(name for name in records if name != kind) or "nothing"
        raise ConfigError(f"{folder} has no {kind} loss{' that is finite' if latest else ''}; it has {others}. Let it "
                          "come to an evaluation, or give another --metric")
    points = [found[step] for step in sorted(found)]
    axes = {name: [point.get(key) for point in points] for name, key in AXES.items()}
    return Curve(np.array([point["loss"] for point in points]),
                 {name: np.array(values, dtype=float) for name, values in axes.items() if None not in values},
                 lost=tuple(step for step in sorted(latest) if step > max(found)),
                 measured_on=frozenset(point.get(MEASURED_ON) for point in points), num_others=num_others)


def kinds_of(folder: Path) -> dict[str, list[dict]]:
    """The records of the run in a folder, by kind; raises ConfigError if the folder holds no run."""
    path = folder / METRICS_FILE
    if not path.is_file():
        inside = sorted(place.parent.name for place in folder.glob(f"*/{METRICS_FILE}"))
        remedy = f"give the runs in it, {folder}/{inside[0]} and so on" if inside else (
            "give the folder that a run was saved in (--save)")
        raise ConfigError(f"{folder} holds no {METRICS_FILE}; {remedy}" if folder.is_dir() else
                          f"{folder} is no folder; {remedy}")
    kinds: dict[str, list[dict]] = {}
    for record in read_records(path):
        kinds.setdefault(record["kind"], []).append(record)
    return kinds


def unlike(digests: Iterable[str | None]) -> str | None:
    """A note that losses with these digests are not comparable; None if all digests are the same."""
    return None if len(set(digests)) < 2 else (
        "note: these losses are not all of the same data (--data-path, --split, --seq-length, --eval-iters or the rows "
        "of a batch are others), or do not all say of what: they do not tell which run is better")


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean of runs, with their spread, at the steps that all have; the other axes are averaged too.

    Raises ConfigError if they have no step in common.
    """
    if len(curves) == 1:
        return curves[0]
    steps = sorted(set.intersection(*(set(curve.axes["steps"]) for curve in curves)))
    if not steps:
        raise ConfigError("these runs have no step in common at which they were evaluated, so they have no mean; give "
                          "them one by one")
    at = [np.searchsorted(curve.axes["steps"], steps) for curve in curves]
    losses = np.stack([curve.losses[index] for curve, index in zip(curves, at, strict=True)])
    axes = {name: np.mean([curve.axes[name][index] for curve, index in zip(curves, at, strict=True)], 0)
            for name in AXES if all(name in curve.axes for curve in curves)}
    lost = {step for curve in curves for step in curve.lost}
    return Curve(losses.mean(0), axes, losses.std(0, ddof=1), tuple(sorted(lost)),
                 frozenset().union(*(curve.measured_on for curve in curves)), sum(curve.num_others for curve in curves))
