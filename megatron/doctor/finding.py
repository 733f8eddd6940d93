"""What a check says: one line, how bad it is, and the command that mends it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import SubprocessError

ROOT = Path(__file__).resolve().parents[2]
OK, NOTE, WRONG = "ok", "note", "wrong"


@dataclass(frozen=True)
class Finding:
    """`level`: ok; note, what costs speed or only some need; wrong, what is needed and is not so.

    `command` mends it, or is what to do next.
    """

    level: str
    text: str
    command: str | None = None


@dataclass(frozen=True)
class Scope:
    """What the user wants looked at: where a run would save, and its data (none for no look at data)."""

    save: Path
    data_path: tuple[str, ...] = ()


Check = Callable[[Scope], Iterable[Finding]]


def found(check: Check, asked: Scope) -> list[Finding]:
    """All that a check finds; what this system refuses to tell is a note."""
    findings: list[Finding] = []
    try:
        findings.extend(check(asked))
    except (OSError, RuntimeError, SubprocessError) as error:  # of a file in /proc or /sys, a library, a program
        why = next(iter(str(error).splitlines()), "")
        findings.append(Finding(NOTE, f"could not be found out: {type(error).__name__}: {why}"))
    return findings


def lines(findings: Iterable[Finding]) -> Iterator[str]:
    """A line for each finding, and one for each command."""
    for finding in findings:
        yield f"  {finding.level:<6} {finding.text}"
        if finding.command:
            yield f"         -> {finding.command}"
