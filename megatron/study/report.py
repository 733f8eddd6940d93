"""Writes the report of a run: report.html beside its checkpoints, a single self-contained page."""

import base64
import io
import platform
import socket
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from statistics import median_high
from typing import Any

import torch
from matplotlib.figure import Figure

from megatron.checkpoint.metrics import comparable, evaluations_of, loss_name, read_records
from megatron.checkpoint.places import BEST, LOSSES, METRICS_FILE, SPIKES, iterations, validations
from megatron.config import Config
from megatron.config.declaration import flag_name, shown
from megatron.config.reading.presets import PRESETS
from megatron.files import write_text
from megatron.log import number_of
from megatron.train.setup.run import Run

REPORT = "report.html"
# What is drawn of the training records: key, title and scale of the axis.
_PANELS = (("masked_accuracy", "masked residues predicted right", "linear"),
           ("grad_norm", "norm of the gradient", "log"), ("learning_rate", "learning rate", "linear"),
           ("residues_per_s", "residues a second", "linear"))
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin-top: 2rem; border-bottom: 1px solid #d5dae0 }
p.where { color: #59636e; margin-top: .2rem; overflow-wrap: anywhere }
table { border-collapse: collapse } td, th { text-align: left; padding: .15rem 1.2rem .15rem 0; vertical-align: top }
th { font-weight: 600; color: #59636e } td.number { font-variant-numeric: tabular-nums }
img { max-width: 100%; height: auto } code { font-size: .9em; overflow-wrap: anywhere }
"""


def leave_report(run: Run) -> None:
    """Write the report of a run with --save that has ended or stopped, and log its path; rank 0 calls this."""
    try:
        run.log.line(f"  report              {write_report(run)}\n")
    except OSError as error:  # the run is complete without it
        run.log.line(f"note: {REPORT} could not be written ({error})")


def write_report(run: Run) -> Path:
    """Write report.html into the run's folder; returns its path. Raises OSError."""
    assert run.config.checkpoint.save is not None
    folder = Path(run.config.checkpoint.save)
    records = read_records(folder / METRICS_FILE)
    sections = [_heading(run, folder), _results(records), _curves(folder, records), _throughput(records),
                _trouble(folder), _data(run), _checkpoints(folder), _configuration(run.config), _environment(run)]
    body = "\n".join(filter(None, sections))
    text = (f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{escape(folder.name)}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>\n'
            f"{body}\n</html>\n")
    write_text(folder / REPORT, text)
    return folder / REPORT


def _heading(run: Run, folder: Path) -> str:
    last = run.sizes.last_iteration(run.state)
    is_done = run.state.iteration >= last
    so_far = f"stopped at step {run.state.iteration:,} of {last:,}"
    state = f"complete: {number_of(last, 'step')}" if is_done else so_far
    model = run.config.model
    return (f"<h1>{escape(folder.name)}</h1><p class=where>{escape(str(folder.resolve()))}<br>{state}, "
            f"{number_of(run.state.consumed_samples, 'row')}; "
            f"{number_of(model.num_layers, 'layer')} x {model.hidden_size}, "
            f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC</p>")


def _results(records: Sequence[Mapping[str, Any]]) -> str:
    kinds = [kind for kind in dict.fromkeys(record["kind"] for record in records) if kind != "train"]
    last = {kind: [record for record in records if record["kind"] == kind][-1] for kind in kinds}
    rows = [[loss_name(kind), f"{record['iteration']:,}", _number(record["loss"], ".4f"),
             _number(record.get("perplexity"), ".2f"), _number(record.get("masked_accuracy"), ".4f"),
             f"{record.get('num_targets', 0):,}"] for kind, record in last.items()]
    others = {loss_name(kind): evaluations_of(records, kind)[1] for kind in kinds}
    notes = [f"<p>{escape(name)}: {count:,} of its evaluations before this are of other data, or do not say of what, "
             "and are not drawn" for name, count in others.items() if count]
    table = _table(rows, ["", "at step", "nats", "perplexity", "accuracy", "masked residues"])
    return _section("Results", "".join([table, *notes]))


def _curves(folder: Path, records: Sequence[Mapping[str, Any]]) -> str:
    losses = folder / LOSSES
    training = [record for record in records if record["kind"] == "train"]
    pictures = [losses.read_bytes()] if losses.exists() else []
    if training:
        pictures.append(_panels(training))
    images = "".join(f'<p><img alt="" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
                     for picture in pictures)
    return _section("Curves", images)


def _panels(training: Sequence[Mapping[str, Any]]) -> bytes:
    figure = Figure(figsize=(8, 5), dpi=100)
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.06, top=0.95, hspace=0.25)
    for panel, (name, label, scale) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        points = [(record["iteration"], record[name]) for record in training if record.get(name) is not None]
        panel.plot(*zip(*points, strict=True)) if points else None
        panel.set(title=label, yscale=scale)
        panel.title.set_fontsize(9)
        panel.tick_params(labelsize=8)
        panel.minorticks_off()
        panel.locator_params(**({"axis": "x"} if scale == "log" else {}), nbins=4)
        panel.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _throughput(records: Sequence[Mapping[str, Any]]) -> str:
    training = [record for record in records if record["kind"] == "train"]
    if not training:
        return ""
    last, speeds = training[-1], [record["residues_per_s"] for record in training]
    shares = [record["share_of_peak"] for record in training if record.get("share_of_peak") is not None]
    rows = [["residues read", _number(last.get("consumed_residues"), ",.0f")],
            ["seconds of training", _number(last.get("training_s"), ",.0f")],
            ["model FLOPs", _number(last.get("consumed_flops"), ".3e")],
            ["residues a second, median of the log lines", f"{median_high(speeds):,.0f}"],
            ["share of the peak, likewise", f"{median_high(shares):.0%}" if shares else "–"],
            ["steps skipped", f"{sum(record.get('skipped_iterations', 0) for record in training):,}"]]
    return _section("Throughput", _table(rows))


def _trouble(folder: Path) -> str:
    files = sorted((folder / SPIKES).glob("*.tsv"))
    if not files:
        return ""
    return _section("Steps that went wrong", _table([[f"<code>{escape(str(file.relative_to(folder)))}</code>"]
                                                    for file in files], ["the proteins of each"]))


def _data(run: Run) -> str:
    parts = (run.data.train, run.data.valid, run.data.test)
    lines = [f"<p>{escape(part.describe())}" for part in parts if part is not None]
    left_out = ", ".join(f"{first:,} to {stop - 1:,}" for first, stop in run.state.left_out)
    return _section("Data", "".join([*lines, f"<p>rows left out: {left_out}" if left_out else ""]))


def _checkpoints(folder: Path) -> str:
    best = (folder / BEST).resolve()
    found = validations(folder)
    is_alike = dict(zip(found, comparable(list(found.values())), strict=True))
    rows = [[f"<code>{place.name}</code>", f"{_size(place) / 1e6:,.1f} MB",
             _number(found[place]["loss"] if place in found else None, ".4f"),
             "best" if place.resolve() == best else "" if is_alike.get(place, True) else "on other data"]
            for place in iterations(folder).values()]
    return _section("Checkpoints", _table(rows, ["", "size", "validation loss", ""]))


def _size(place: Path) -> int:
    return sum(file.stat().st_size for file in place.iterdir() if file.is_file())


def _configuration(config: Config) -> str:
    """The flags that differ from the defaults, and a collapsed list of all flags."""
    values, defaults = config.as_dict(), Config().as_dict()
    names = {item.name: flag_name(item) for _, section in config.sections()
             for item in section.__dataclass_fields__.values()}
    rows = [[f"<code>{names[name]}</code>", f"<code>{escape(shown(value))}</code>", value != defaults[name]]
            for name, value in sorted(values.items())]
    changed = _table([row[:2] for row in rows if row[2]])
    presets = [name for name, those in PRESETS.items() if all(values[key] == value for key, value in those.items())]
    said = f"<p>As preset <code>{escape(presets[0])}</code>." if presets else ""
    everything = f"<details><summary>all {len(rows)} flags</summary>{_table([row[:2] for row in rows])}</details>"
    return _section("Flags that are not the defaults", f"{said}{changed}{everything}")


def _environment(run: Run) -> str:
    mesh = run.mesh
    device = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads a rank")
    layout = ", ".join(f"{name} {axis.size}" for name, axis in (
        ("data", mesh.data), ("tensor", mesh.tensor), ("pipeline", mesh.pipeline), ("context", mesh.context)))
    rows = [["host of the first rank", escape(socket.gethostname())], ["device", escape(device)],
            ["ranks", f"{mesh.world.size} ({layout})"], ["Python", platform.python_version()],
            ["PyTorch", escape(torch.__version__)], ["system", escape(platform.platform())]]
    return _section("Environment", _table(rows))


def _section(title: str, body: str) -> str:
    return f"<h2>{title}</h2>{body}" if body else ""


def _table(rows: Iterable[Sequence[Any]], head: Sequence[str] = ()) -> str:
    """An HTML table of cells that are HTML already; empty without rows."""
    lines = [f"<tr>{''.join(f'<td class=number>{cell}' for cell in row)}" for row in rows]
    top = f"<tr>{''.join(f'<th>{cell}' for cell in head)}" if head else ""
    return f"<table>{top}{''.join(lines)}</table>" if lines else ""


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
