"""argparse, as the project's programs have it: flags from dataclasses, a mistake in one line, help that reads well."""

import argparse
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import Field, fields
from types import MappingProxyType
from typing import Any, NoReturn

from megatron.config.declaration import can_be_off, flag_name, is_switch, shown
from megatron.errors import ConfigError

_LEAST_COLUMNS, _MOST_COLUMNS = 80, 120
_LONGEST_CHOICES = 40  # letters of the choices that help shows in place of a value
_VALUES = {"file": "FILE", "folder": "FOLDER", "prefix": "PREFIX", int: "N", float: "X", str: "TEXT"}


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a mistake raises a ConfigError of one line instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


class HelpLines(argparse.HelpFormatter):
    """All names of a flag, its value once, and beside them what it is."""

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
    """How wide help is: as the terminal, from 80 to 120."""
    return min(_MOST_COLUMNS, max(_LEAST_COLUMNS, shutil.get_terminal_size().columns)) - 1


def value_name(item: Field) -> str:
    """What help calls a flag's value."""
    choices = item.metadata["choices"]
    if choices is None:
        name = _VALUES[item.metadata["path"] or item.metadata["type"]]
        return f"{name} …" if item.metadata["nargs"] == "+" else " ".join([name] * (item.metadata["nargs"] or 1))
    return next(iter(choices)) if len(choices) == 1 else "NAME"


def add_section_flags(parser: argparse.ArgumentParser, section: type, names: Collection[str] | None = None,
                      texts: Mapping[str, str] = MappingProxyType({})) -> None:
    """Add a flag for each field of the dataclass `section`, or of `names`; one that is not given leaves no value.

    `texts`: by their names, the help of those that are something else in this program, with their defaults.
    """
    chosen = [item for item in fields(section) if names is None or item.name in names]
    if chosen:
        group = parser.add_argument_group(section.__name__.removesuffix("Config").lower(), section.__doc__)
        _add(group, chosen, texts)


def _add(group: argparse._ArgumentGroup, items: Iterable[Field], texts: Mapping[str, str]) -> None:
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
