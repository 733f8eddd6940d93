"""Declares a flag: one field of a frozen dataclass, with its default, help text and check."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, field
from typing import Any, Literal

# What happens if a run is resumed with another value of a flag. A checkpoint refuses to load if the flag changes the
# "arithmetic" of the weights, or the "vocabulary" (unless the tokens are the same, in whatever file). The run goes on
# and says so if it changes the "samples" (rows and masks), the "course" of training (the steps), or the "dropout",
# which also changes the steps, but belongs to the model and so is taken from a checkpoint. "nothing": no effect on
# results.
Changes = Literal["arithmetic", "vocabulary", "dropout", "samples", "course", "nothing"]
PathKind = Literal["file", "folder", "prefix"]  # "prefix": of PREFIX.bin and PREFIX.idx
Check = tuple[Callable[[Any], bool], str]  # a predicate on the value, and what it must be, for messages
positive: Check = (lambda value: value > 0, "greater than 0")
not_negative: Check = (lambda value: value >= 0, "0 or greater")
fraction: Check = (lambda value: 0 <= value < 1, "at least 0 and less than 1")


def flag(default: Any, help: str, *, kind: type = str, check: Check | None = None, name: str | None = None,
         aliases: tuple[str, ...] = (), choices: Collection[Any] | None = None, nargs: int | str | None = None,
         changes: Changes | None = None, common: bool = False, path: PathKind | None = None,
         may_differ: bool = False, is_hidden: bool = False) -> Any:
    """A dataclass field that is also a command-line flag, called `--field-name` unless `name` is given.

    A field with a bool as default is a switch, set by `--x` and unset by `--no-x`. `common`: also in the short help.
    `path`: the kind of path that its value is, for shell completion. `may_differ`: ranks of one run may have different
    values. `is_hidden`: not in any help.
    """
    metadata = {"help": help, "type": kind, "check": check, "name": name, "aliases": aliases, "choices": choices,
                "nargs": nargs, "changes": changes, "common": common, "path": path,
                "may_differ": may_differ, "is_hidden": is_hidden}
    return field(default=default, metadata=metadata)


def flag_name(item: Field) -> str:
    """The flag's name on the command line, with its dashes."""
    return "--" + (item.metadata["name"] or item.name.replace("_", "-"))


def is_switch(item: Field) -> bool:
    """Whether the flag is a switch, on or off, that takes no value."""
    return item.metadata["type"] is bool or isinstance(item.default, bool)


def can_be_off(item: Field) -> bool:
    """Whether there is also --no-x for the switch --x."""
    return is_switch(item) and not item.name.startswith("no_")


def shown(value: Any) -> str:
    """A flag's value as text, as on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values by field name with lists, from a command line or JSON, as tuples, as the dataclasses have them."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def in_words(item: Field, value: Any) -> str:
    """A flag's value as text for a sentence: "on" or "off" for a switch, "none" for no value."""
    return "none" if value is None else ("on" if value else "off") if is_switch(item) else shown(value)


def as_given(item: Field, words: str) -> str:
    """The flag with the value that `in_words` calls `words`, as on a command line: --x 3, --x, --no-x, or "no --x"."""
    name = flag_name(item)
    if words == "none" or (words == "off" and is_switch(item) and not can_be_off(item)):
        return f"no {name}"
    return (name if words == "on" else f"--no-{name[2:]}") if is_switch(item) else f"{name} {words}"
