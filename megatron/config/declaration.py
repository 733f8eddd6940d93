"""How a flag is born: as one field of a frozen dataclass, with its default, help text and check."""

from collections.abc import Callable
from dataclasses import field
from typing import Any, Literal

# What another value does to a run that goes on: "arithmetic" makes another function of the same weights, so that a
# checkpoint refuses to load; "vocabulary" does too, unless the tokens are the same wherever their file lies; "samples"
# gives other rows or masks, "course" other steps, and so does "dropout", but it comes with a model: these the run says.
Changes = Literal["arithmetic", "vocabulary", "dropout", "samples", "course", "nothing"]
Check = tuple[Callable[[Any], bool], str]
positive: Check = (lambda value: value > 0, "greater than 0")
not_negative: Check = (lambda value: value >= 0, "0 or greater")
fraction: Check = (lambda value: 0 <= value < 1, "at least 0 and less than 1")


def flag(default: Any, help: str, *, kind: type = str, check: Check | None = None, name: str | None = None,
         aliases: tuple[str, ...] = (), choices: tuple[Any, ...] | None = None, nargs: int | str | None = None,
         changes: Changes | None = None, is_hidden: bool = False) -> Any:
    """A dataclass field that is also a command-line flag; `--its-name` unless `name` says otherwise.

    Fields whose default is a bool become switches: `False` is set by `--x`, `True` is unset by `--no-x`. `is_hidden`:
    no help tells of it.
    """
    metadata = {"help": help, "type": kind, "check": check, "name": name, "aliases": aliases, "choices": choices,
                "nargs": nargs, "changes": changes, "is_hidden": is_hidden}
    return field(default=default, metadata=metadata)
