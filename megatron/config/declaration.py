"""How a flag is born: as one field of a frozen dataclass, with its default, help text and check."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, field
from typing import Any, Literal

# What another value does to a run that goes on: "arithmetic" makes another function of the same weights, so that a
# checkpoint refuses to load; "vocabulary" does too, unless the tokens are the same wherever their file lies; "samples"
# gives other rows or masks, "course" other steps, and so does "dropout", but it comes with a model: these the run says.
Changes = Literal["arithmetic", "vocabulary", "dropout", "samples", "course", "nothing"]
PathKind = Literal["file", "folder", "prefix"]  # the last: of PREFIX.bin and PREFIX.idx
Check = tuple[Callable[[Any], bool], str]
positive: Check = (lambda value: value > 0, "greater than 0")
not_negative: Check = (lambda value: value >= 0, "0 or greater")
fraction: Check = (lambda value: 0 <= value < 1, "at least 0 and less than 1")


def flag(default: Any, help: str, *, kind: type = str, check: Check | None = None, name: str | None = None,
         aliases: tuple[str, ...] = (), choices: Collection[Any] | None = None, nargs: int | str | None = None,
         changes: Changes | None = None, common: bool = False, path: PathKind | None = None,
         is_hidden: bool = False) -> Any:
    """A dataclass field that is also a command-line flag; `--its-name` unless `name` says otherwise.

    Fields whose default is a bool become switches: `False` is set by `--x`, `True` is unset by `--no-x`.
    `common`: in the short help too. `path`: what its value is the path of, for whoever completes it. `is_hidden`:
    no help tells of it.
    """
    metadata = {"help": help, "type": kind, "check": check, "name": name, "aliases": aliases, "choices": choices,
                "nargs": nargs, "changes": changes, "common": common, "path": path,
                "is_hidden": is_hidden}
    return field(default=default, metadata=metadata)


def flag_name(item: Field) -> str:
    """How the field is spelled on the command line."""
    return "--" + (item.metadata["name"] or item.name.replace("_", "-"))


def is_switch(item: Field) -> bool:
    """Whether the flag takes no value: it is on or off."""
    return item.metadata["type"] is bool or isinstance(item.default, bool)


def can_be_off(item: Field) -> bool:
    """Whether there is a --no-x beside the switch --x."""
    return is_switch(item) and not item.name.startswith("no_")


def shown(value: Any) -> str:
    """A flag's value as on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by their fields' names as dataclasses hold them: lists, of a command line or JSON, as tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def in_words(item: Field, value: Any) -> str:
    """The same in a sentence: a switch is on or off, and what has no value is none."""
    return "none" if value is None else ("on" if value else "off") if is_switch(item) else shown(value)
