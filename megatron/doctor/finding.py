"""The result of a check: one line of text, its severity, and the command that fixes it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import SubprocessError

ROOT = Path(__file__).resolve().parents[2]
OK, NOTE, WRONG = "ok", "note", "wrong"


@dataclass(frozen=True)
class Finding:
    """One result of a check.

    `level`: OK; NOTE, for what costs speed or matters to some users only; WRONG, for what must be fixed. `command`:
    fixes it, or is what to do next.
    """

    level: str
    text: str
    command: str | None = None


def found(*checks: Iterable[Finding]) -> list[Finding]:
    """The findings of checks, which do their work in being iterated; an error of the system in one becomes a NOTE."""
    findings: list[Finding] = []
    for check in checks:
        try:
            findings.extend(check)
        except (OSError, RuntimeError, SubprocessError) as error:  # from files in /proc or /sys, libraries, programs
            why = next(iter(str(error).splitlines()), "")
            findings.append(Finding(NOTE, f"could not be found out: {type(error).__name__}: {why}"))
    return findings


def lines(findings: Iterable[Finding]) -> Iterator[str]:
    """The lines to print: one for each finding, and one for its command."""
    for finding in findings:
        yield f"  {finding.level:<6} {finding.text}"
        if finding.command:
            yield f"         -> {finding.command}"
