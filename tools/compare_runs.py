"""Compares runs: their loss curves in one picture, and what each needed to reach a loss.

    python tools/compare_runs.py RUN [RUN ...] [NAME=RUN,RUN,RUN ...] [--loss NATS] [--output compare.png]

RUN is the folder of a run (its --save), running or finished. NAME=RUN,RUN,RUN is one curve, the mean of runs that
differ in their seed, with a band of one standard deviation. The picture has four panels: the loss over steps, residues,
seconds and FLOPs. The table says where each first reached --loss, interpolated linearly between two evaluations, and
that divided by the first run's.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # else it is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.checkpoint.metrics import loss_name  # noqa: E402
from megatron.config.command_line import OneLineParser  # noqa: E402
from megatron.errors import ConfigError, OutputError  # noqa: E402
from megatron.log import exit_status, in_time  # noqa: E402
from megatron.study.curves import AXES, Curve, kinds_of, mean_curve, read_curve, unlike  # noqa: E402
from megatron.study.naming import differing_flags, names_of  # noqa: E402
from megatron.study.table import in_short, table  # noqa: E402

IN_WORDS = {"steps": "{:,.0f}".format, "residues": in_short, "seconds": in_time, "flops": in_short}
HEADS = {"steps": "steps", "residues": "residues", "seconds": "time", "flops": "FLOPs"}


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flags.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or NAME=RUN,RUN,RUN: a mean of runs")
    flags.add_argument("--loss", type=float, metavar="NATS",
                       help="the loss to reach (default: the worst of the runs' best losses)")
    flags.add_argument("--metric", default="valid", metavar="KIND",
                       help="which loss: valid, valid_ema (of the weight average), train, test, or valid/NAME of one "
                            "corpus (default: valid)")
    flags.add_argument("--output", type=Path, default=Path("compare.png"), metavar="FILE",
                       help="the picture (default: compare.png)")
    flags.add_argument("--smooth", action="store_true",
                       help="also draw the smoothed training loss, as a thin line behind the other")
    flags.add_argument("--json", action="store_true", help="print JSON, in seconds and whole numbers")
    return flags


@dataclass(frozen=True)
class Compared:
    """A run, or several of one kind, with the curve that is compared and the one behind it."""

    name: str
    folders: list[Path]
    flags: dict[str, Any]
    curve: Curve
    training: Curve | None


def main(argv: Sequence[str]) -> int:
    """The exit status: 0, 2 for a mistake of the user's, 130 after Ctrl-C."""
    return exit_status(lambda: compare(parser().parse_args(argv)))


def compare(given: argparse.Namespace) -> None:
    """Print and draw what is asked for; raises a UserError for what cannot be compared."""
    if given.loss is not None and not math.isfinite(given.loss):
        raise ConfigError(f"--loss is {given.loss}; give a number of nats, such as 2.6")
    runs = read_runs(given.runs, given.metric, given.smooth)
    loss = given.loss if given.loss is not None else max(float(run.curve.losses.min()) for run in runs)
    draw(runs, loss, given.metric, given.output)
    facts = [facts_of(run, loss) for run in runs]
    if given.json:
        print(json.dumps({"metric": given.metric, "loss": loss, "picture": str(given.output), "runs": facts}, indent=1))
        return
    print(as_table(facts, loss, given.metric))
    if (note := unlike(digest for run in runs for digest in run.curve.measured_on)) is not None:
        print(note)
    for run in runs:
        if run.curve.num_others:
            print(f"note: {run.name} was evaluated on other data before: {run.curve.num_others:,} of its losses are "
                  "left out")
        if run.curve.lost:
            print(f"note: {run.name} is not finite from step {run.curve.lost[0]:,} on")
        if run.curve.missing:
            print(f"note: {run.name} is not drawn over {', '.join(run.curve.missing)}: its metrics.jsonl is of an "
                  "edition that did not record that")
    print(f"\ncurves: {given.output}")


def read_runs(words: Sequence[str], metric: str, with_training: bool) -> list[Compared]:
    """The runs of the command line, in its order; raises ConfigError."""
    said, groups = zip(*map(_group, words), strict=True)
    differing = differing_flags(groups)
    unnamed = [index for index, name in enumerate(said) if not name]
    names = list(said)
    for index, name in zip(unnamed, names_of([groups[index] for index in unnamed],
                                             [differing[index] for index in unnamed]), strict=True):
        names[index] = name
    if len(set(names)) < len(names):
        raise ConfigError(f"{max(names, key=names.count)} is given twice; give each run once, under a name of its own")
    return [Compared(name, folders, flags, mean_curve([read_curve(folder, metric) for folder in folders]),
                     _training(folders) if with_training and metric != "train" else None)
            for name, folders, flags in zip(names, groups, differing, strict=True)]


def _group(word: str) -> tuple[str, list[Path]]:
    """The name in front of `=`, empty where there is none, and the folders behind it."""
    name, equals, rest = word.partition("=")
    if Path(word).exists() or not equals:
        return "", [Path(word)]
    folders = [Path(text) for text in rest.split(",") if text]
    if not folders:
        raise ConfigError(f"{word}: no run stands behind the name; give its folders, e.g. {name or 'NAME'}=runs/demo")
    return name, folders


def _training(folders: Sequence[Path]) -> Curve | None:
    """The training loss, smoothed, of runs that have logged one."""
    if not all("train" in kinds_of(folder) for folder in folders):
        return None
    return mean_curve([read_curve(folder, "train") for folder in folders]).smoothed()


def draw(runs: Sequence[Compared], loss: float, metric: str, path: Path) -> None:
    """Write the picture; raises OutputError."""
    from megatron.study.comparison_picture import draw_comparison  # matplotlib: slow to import, needed once

    try:
        draw_comparison({run.name: run.curve for run in runs},
                        {run.name: run.training for run in runs if run.training is not None}, loss,
                        f"{loss_name(metric)} (nats a masked residue)", path)
    except (OSError, ValueError) as error:
        raise OutputError(f"--output {path} cannot be written ({getattr(error, 'strerror', None) or error}); "
                          "name a .png, .pdf or .svg in a folder that is "
                          "there") from error


def facts_of(run: Compared, loss: float) -> dict[str, Any]:
    """Everything about a run that JSON can hold; what a run did not record, or reach, is null."""
    curve, best = run.curve, run.curve.best()
    at = curve.reached(loss)
    return {"name": run.name, "folders": [str(folder) for folder in run.folders], "flags": run.flags,
            "steps": curve.last_step, "final_loss": None if curve.lost else float(curve.losses[-1]),
            "final_spread": None if curve.spread is None or curve.lost else float(curve.spread[-1]),
            "not_finite_from": curve.lost[0] if curve.lost else None,
            "best_loss": float(curve.losses[best]), "best_step": int(curve.axes["steps"][best]),
            "measured_on": sorted(filter(None, curve.measured_on)),
            "reached": None if at is None else {axis: at.get(axis) for axis in AXES}}


def as_table(facts: Sequence[dict[str, Any]], loss: float, metric: str) -> str:
    """The runs, one a line: how far they came, and behind that what each took to come to `loss`."""
    heads = ["run", "steps", "final", "best", "at step", *HEADS.values()]
    rows = [[run["name"], f"{run['steps']:,}", _loss(run), f"{run['best_loss']:.4f}", f"{run['best_step']:,}",
             *_reached(run["reached"], facts[0]["reached"])] for run in facts]
    about = f"{loss_name(metric)} in nats, and what it took to come to {loss:.4f}" + (
        " (times what the first took)" if len(facts) > 1 and facts[0]["reached"] else "")
    return f"{about}:\n\n{table(heads, rows)}"


def _loss(run: dict[str, Any]) -> str:
    if run["final_loss"] is None:
        return "not finite"
    spread = run["final_spread"]
    return f"{run['final_loss']:.4f}" + ("" if spread is None else f" ± {spread:.4f}")


def _reached(at: dict[str, float | None] | None, first: dict[str, float | None] | None) -> list[str]:
    if at is None:
        return ["not reached", *[""] * (len(AXES) - 1)]
    cells = []
    for axis in AXES:
        here, there = at[axis], (first or {}).get(axis)
        times = f" ({here / there:.2f}x)" if here is not None and there and at is not first else ""
        cells.append("?" if here is None else IN_WORDS[axis](here) + times)
    return cells


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
