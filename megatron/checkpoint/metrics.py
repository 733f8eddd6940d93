"""Reads and writes metrics.jsonl, one JSON object for each log event.

Reading skips what crashes and users may have left in it; writing survives a full disk.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron.files import write_text
from megatron.log import Log

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


class MetricsWriter:
    """Adds records to the file; what the disk refuses is said once, kept, and written once there is room again."""

    def __init__(self, metrics: Path, log: Log) -> None:
        self.path, self._log = metrics, log
        self._unwritten = b""  # lines that the disk has refused so far

    def add(self, record: Mapping[str, Any]) -> None:
        """Write a record, in which a number that is not finite, and so means nothing, is null."""
        known = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                 for name, value in record.items()}
        self._append(f"{json.dumps(known)}\n".encode())

    def close(self) -> None:
        """Try once more to write what the disk has refused."""
        if self._unwritten:
            self._append(b"")

    def _append(self, line: bytes) -> None:
        was_refused, self._unwritten = bool(self._unwritten), self._unwritten + line
        size = None
        try:
            size = self.path.stat().st_size if self.path.exists() else 0
            with self.path.open("ab") as file:
                file.write(self._unwritten)
            self._unwritten = b""
        except OSError as error:
            with suppress(OSError):
                if size is not None:
                    os.truncate(self.path, size)  # no half a line
            if not was_refused:
                self._log.line(f"note: {self.path} cannot be written ({error.strerror or error}): its lines are "
                               "kept, and written once there is room again")


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
