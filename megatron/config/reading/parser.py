"""The project's use of argparse: flags derived from dataclasses, mistakes in one line, and compact help."""

import argparse
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import Field, fields
from types import MappingProxyType
from typing import Any, NoReturn

from megatron.config.declaration import can_be_off, flag_name, is_switch, shown
from megatron.errors import ConfigError

_LEAST_COLUMNS, _MOST_COLUMNS = 80, 120
_LONGEST_CHOICES = 40  # characters; help lists longer choices in the text, not in place of the value
# What argparse says of a value that is no number: all names of its flag, int or float, the value in quotes.
_NO_NUMBER = re.compile(r"argument (?P<flag>[^/ ]+)\S*: invalid (?P<kind>int|float) value: (?P<value>.*)", re.DOTALL)
_KINDS = {"int": "a whole number", "float": "a number"}
_VALUES = {"file": "FILE", "folder": "FOLDER", "prefix": "PREFIX", int: "N", float: "X", str: "TEXT"}


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that raises a ConfigError of one line for a mistake, instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        if found := _NO_NUMBER.match(message):
            message = f"{found['flag']} is {found['value']}; it must be {_KINDS[found['kind']]}"
        raise ConfigError(message)


class HelpLines(argparse.HelpFormatter):
    """A help formatter that shows all names of a flag followed by its value once, and its help beside them."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=columns())

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return ", ".join(f"--[no-]{name[2:]}" for name in action.option_strings if not name.startswith("--no-"))
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"


def columns() -> int:
    """The width of help in characters: that of the terminal, limited to 80 to 120, minus 1."""
    return min(_MOST_COLUMNS, max(_LEAST_COLUMNS, shutil.get_terminal_size().columns)) - 1


def value_name(item: Field) -> str:
    """The placeholder for a flag's value in help."""
    choices = item.metadata["choices"]
    if choices is None:
        name = _VALUES[item.metadata["path"] or item.metadata["type"]]
        return f"{name} …" if item.metadata["nargs"] == "+" else " ".join([name] * (item.metadata["nargs"] or 1))
    return next(iter(choices)) if len(choices) == 1 else "NAME"


def add_section_flags(parser: argparse.ArgumentParser, section: type, names: Collection[str] | None = None,
                      texts: Mapping[str, str] = MappingProxyType({})) -> None:
    """Add a flag for each field of the dataclass `section`, or for those in `names`.

    A flag that is not given is absent from the parsed namespace. `texts`: by field name, help with the default for
    flags that differ in this program.
    """
    chosen = [item for item in fields(section) if names is None or item.name in names]
    if chosen:
        group = parser.add_argument_group(section.__name__.removesuffix("Config").lower(), section.__doc__)
        _add(group, chosen, texts)


def _add(group: argparse._ArgumentGroup, items: Iterable[Field], texts: Mapping[str, str]) -> None:
    """Add a flag for each field; `texts` is as in `add_section_flags`."""
    for item in items:
        is_hidden = item.metadata["is_hidden"]
        text = argparse.SUPPRESS if is_hidden else texts.get(item.name, item.metadata["help"]).replace("%", "%%")
        options: dict[str, Any] = {"dest": item.name, "default": argparse.SUPPRESS, "help": text}
        if is_switch(item):
            options["action"] = argparse.BooleanOptionalAction if can_be_off(item) else "store_true"
        else:
            meta, choices = item.metadata, item.metadata["choices"]
            options |= {"type": meta["type"], "choices": choices, "nargs": meta["nargs"]}
            if choices is None:
                options["metavar"] = _VALUES[meta["path"] or meta["type"]]
            elif len(names := ", ".join(map(str, choices))) > _LONGEST_CHOICES:
                options |= {"metavar": "NAME", "help": f"{text}; one of {names}"}
            if item.default not in (None, ()) and not is_hidden and item.name not in texts:
                options["help"] += f" (default: {shown(item.default)})"
        group.add_argument(flag_name(item), *item.metadata["aliases"], **options)
