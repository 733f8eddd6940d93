"""Reads metrics.jsonl, one JSON object for each log event, and skips what crashes and users may have left in it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.files import write_text

OF_AVERAGE = "_ema"  # suffix of the kind of a record that evaluates the average of the weights
MEASURED_ON = "measured_on"  # key of the digest of the data that was evaluated (`data.rows.dataset.measured_on`)
_SPLITS = {"valid": "validation", "train": "training"}


def loss_name(kind: str) -> str:
    """The name to show for the loss of a kind of record, such as "validation loss on CORPUS" for "valid/CORPUS"."""
    split, _, corpus = kind.partition("/")
    name, of_average = split.removesuffix(OF_AVERAGE), " of the average" if split.endswith(OF_AVERAGE) else ""
    return f"{_SPLITS.get(name, name)} loss{of_average}{f' on {corpus}' if corpus else ''}"


def read_records(metrics: Path) -> list[dict[str, Any]]:
    """The records in the file, in order; damaged lines and notes are skipped. Raises OSError."""
    return [record for line in metrics.read_bytes().splitlines() if (record := _record(line)) is not None]


def comparable(evaluations: Sequence[Mapping[str, Any]]) -> list[bool]:
    """For each evaluation, whether it was measured on the same data as the last one, by the digest MEASURED_ON.

    Evaluations without a digest count as measured on the same, unknown data.
    """
    return [one.get(MEASURED_ON) == evaluations[-1].get(MEASURED_ON) for one in evaluations]


def evaluations_of(records: Sequence[Mapping[str, Any]], kind: str) -> tuple[list[Mapping[str, Any]], int]:
    """The records of `kind` that were measured on the same data as its last one, and the number of the others."""
    of_kind = [record for record in records if record["kind"] == kind]
    found = [record for record, is_alike in zip(of_kind, comparable(of_kind), strict=True) if is_alike]
    return found, len(of_kind) - len(found)


def forget_after(metrics: Path, iteration: int) -> None:
    """Remove from the file the records after `iteration` and damaged lines; lines of text by a user stay."""
    content = metrics.read_bytes() if metrics.exists() else b""
    lines = content.splitlines()
    kept = [line for line in lines
            if _is_note(line) or ((record := _record(line)) is not None and record["iteration"] <= iteration)]
    if kept != lines or not content.endswith(b"\n"):
        write_text(metrics, "".join(f"{_text(line)}\n" for line in kept))


def _record(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None if it is not one."""
    try:
        record = json.loads(_text(line))
    except ValueError:
        return None
    is_whole = isinstance(record, dict) and isinstance(record.get("kind"), str) and type(record.get("iteration")) is int
    return record if is_whole else None


def _text(line: bytes) -> str:
    """The line without NUL bytes at its ends, which a power cut can leave; raises UnicodeDecodeError."""
    return line.strip(b"\0").decode("utf-8")


def _is_note(line: bytes) -> bool:
    """Whether the line is a user's text; a line that starts with a brace is a truncated record instead."""
    try:
        return _text(line).isprintable() and not _text(line).lstrip().startswith("{")
    except UnicodeDecodeError:
        return False
