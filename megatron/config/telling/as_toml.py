"""Writes a configuration as TOML that `--config` reads, and lists the differences of two configurations."""

import json
import textwrap
from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Any

from megatron.config import Config
from megatron.config.declaration import flag_name, in_words
from megatron.config.telling.help import in_short

OF_A_PROCESS = ("local_rank",)  # not written to files, since it differs between ranks
_VALUES_TO, _LINES_TO, _LEAST_HELP = 44, 120, 20


def as_toml(plain: Config, filled: Config, origin: str) -> str:
    """The text of a TOML file with the values of `plain`, from which `filled` derives further ones.

    Derived values, and flags without a value, are commented out, so that they adapt if other values are edited.
    `origin`: where the values come from, for the first line.
    """
    lines = [f"# Flags of pretrain_tape.py: {origin}. `--config FILE` takes them, and flags beside it win.",
             "# What is commented out has no value, or the one that follows from the others."]
    for (name, section), (_, resolved) in zip(plain.sections(), filled.sections(), strict=True):
        lines += ["", f"# {section.__doc__}", f"[{name}]"]
        lines += [_line(item, getattr(section, item.name), getattr(resolved, item.name)) for item in fields(section)
                  if item.name not in OF_A_PROCESS and not (
                      item.metadata["is_hidden"] and getattr(section, item.name) == item.default)]
    return "\n".join(lines) + "\n"


def written(plain: Config, filled: Config) -> dict[str, Any]:
    """The values by field name that the text of `as_toml` sets; the defaults of what is commented out in it."""
    return {item.name: getattr(section, item.name) if getattr(section, item.name) == getattr(resolved, item.name)
            else item.default
            for (_, section), (_, resolved) in zip(plain.sections(), filled.sections(), strict=True)
            for item in fields(section)}


def unwritable(config: Config) -> list[str]:
    """The flags whose values cannot be written to a file: paths that are not valid Unicode."""
    return [flag_name(item) for _, section in config.sections() for item in fields(section)
            if _has_no_text(getattr(section, item.name))]


def changes(now: Mapping[str, Any], before: Mapping[str, Any], was: str) -> list[str]:
    """A line for each flag whose value differs between `now` and `before`, two dicts by field name.

    `was`: what to call the value in `before`, such as "preset". Flags that `as_toml` cannot write are left out.
    """
    items = {item.name: item for _, section in Config().sections() for item in fields(section)}
    rows = [(flag_name(items[name]), in_words(items[name], value), in_words(items[name], before[name]))
            for name, value in now.items()
            if value != before[name] and name not in OF_A_PROCESS and not _has_no_text(value)]
    return [f"  {name:<36} {value:<24} ({was}: {other})" for name, value, other in rows]


def _line(item: Field, value: Any, resolved: Any) -> str:
    """The line of a flag in the file, with its help as a comment; `resolved`: its value after deriving."""
    key = flag_name(item).removeprefix("--")
    text = f"{key} = {_toml(value)}" if value == resolved and value is not None else (
        f"# {key} =" if resolved is None else f"# {key} = {_toml(resolved)}")
    if _has_no_text(value):
        return f"# {key} is a path that no text can say: give {flag_name(item)}"
    room = _LINES_TO - 4 - max(_VALUES_TO, len(text))
    if room <= _LEAST_HELP:
        return text
    return f"{text:<{_VALUES_TO}}  # {textwrap.shorten(in_short(item), room, placeholder=' …')}"


def _toml(value: Any) -> str:
    """A value in TOML."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _has_no_text(value: Any) -> bool:
    """Whether a value contains text that stands for bytes that are not UTF-8, as a path may."""
    return any("\ud800" <= letter <= "\udfff" for one in (value if isinstance(value, tuple) else (value,))
               if isinstance(one, str) for letter in one)
