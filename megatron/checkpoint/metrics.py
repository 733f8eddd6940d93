"""metrics.jsonl, one JSON object a log event, read with whatever power cuts, killed runs and users leave in it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.files import write_text

OF_AVERAGE = "_ema"  # ends the kind of a split's evaluation where it is of the average of the weights
MEASURED_ON = "measured_on"  # of an evaluation: the digest of what it is of, by `data.rows.dataset.measured_on`
_SPLITS = {"valid": "validation", "train": "training"}


def loss_name(kind: str) -> str:
    """What the loss of a kind of record is called."""
    split, _, corpus = kind.partition("/")
    name, of_average = split.removesuffix(OF_AVERAGE), " of the average" if split.endswith(OF_AVERAGE) else ""
    return f"{_SPLITS.get(name, name)} loss{of_average}{f' on {corpus}' if corpus else ''}"


def read_records(metrics: Path) -> list[dict[str, Any]]:
    """The records in the file, in its order; whatever else is there is passed over."""
    return [record for line in metrics.read_bytes().splitlines() if (record := _record(line)) is not None]


def comparable(evaluations: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Of evaluations in their order, each with its digest MEASURED_ON, which were of what the last one was of.

    Those without a digest are of one thing that is not known.
    """
    return [one.get(MEASURED_ON) == evaluations[-1].get(MEASURED_ON) for one in evaluations]


def evaluations_of(records: Sequence[Mapping[str, Any]], kind: str) -> tuple[list[Mapping[str, Any]], int]:
    """The records of a kind that can be compared with its last one, and how many others there are."""
    of_kind = [record for record in records if record["kind"] == kind]
    found = [record for record, is_alike in zip(of_kind, comparable(of_kind), strict=True) if is_alike]
    return found, len(of_kind) - len(found)


def forget_after(metrics: Path, iteration: int) -> None:
    """Drop the records that lie after `iteration`, and damaged lines; a user's notes stay."""
    content = metrics.read_bytes() if metrics.exists() else b""
    lines = content.splitlines()
    kept = [line for line in lines
            if _is_note(line) or ((record := _record(line)) is not None and record["iteration"] <= iteration)]
    if kept != lines or not content.endswith(b"\n"):
        write_text(metrics, "".join(f"{_text(line)}\n" for line in kept))


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(_text(line))
    except ValueError:
        return None
    is_whole = isinstance(record, dict) and isinstance(record.get("kind"), str) and type(record.get("iteration")) is int
    return record if is_whole else None


def _text(line: bytes) -> str:
    """The line without the zeros that a power cut leaves where a file had grown; raises UnicodeDecodeError."""
    return line.strip(b"\0").decode("utf-8")


def _is_note(line: bytes) -> bool:
    """Whether the line is text of a user's: a record that was cut off starts with a brace."""
    try:
        return _text(line).isprintable() and not _text(line).lstrip().startswith("{")
    except UnicodeDecodeError:
        return False
