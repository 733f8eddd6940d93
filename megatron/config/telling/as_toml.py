"""A configuration as a TOML file that `--config` takes, and what two configurations differ in."""

import json
import textwrap
from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Any

from megatron.config import Config
from megatron.config.declaration import flag_name, in_words
from megatron.config.telling.help import in_short

OF_A_PROCESS = ("local_rank",)  # what no file says: it is another on each rank
_VALUES_TO, _LINES_TO, _LEAST_HELP = 44, 120, 20


def as_toml(plain: Config, filled: Config, origin: str) -> str:
    """The text of a file that gives `plain`, and so `filled`, which has what follows from it.

    What follows, and what has no value, is there commented out, so that another value may change it. `origin`: what the
    values come from, in words.
    """
    lines = [f"# Flags of pretrain_tape.py: {origin}. `--config FILE` takes them, and flags beside it win.",
             "# What is commented out has no value, or the one that follows from the others."]
    for (name, section), (_, resolved) in zip(plain.sections(), filled.sections(), strict=True):
        lines += ["", f"# {section.__doc__}", f"[{name}]"]
        lines += [_line(item, getattr(section, item.name), getattr(resolved, item.name)) for item in fields(section)
                  if item.name not in OF_A_PROCESS and not (
                      item.metadata["is_hidden"] and getattr(section, item.name) == item.default)]
    return "\n".join(lines) + "\n"


def unwritable(config: Config) -> list[str]:
    """The flags whose values no file holds: paths that are no text."""
    return [flag_name(item) for _, section in config.sections() for item in fields(section)
            if _has_no_text(getattr(section, item.name))]


def changes(now: Mapping[str, Any], before: Mapping[str, Any], was: str) -> list[str]:
    """A line for each flag, by its field's name in both, whose value is not what it `was`: "preset", "before", …

    Not for what `as_toml` cannot say.
    """
    items = {item.name: item for _, section in Config().sections() for item in fields(section)}
    rows = [(flag_name(items[name]), in_words(items[name], value), in_words(items[name], before[name]))
            for name, value in now.items()
            if value != before[name] and name not in OF_A_PROCESS and not _has_no_text(value)]
    return [f"  {name:<36} {value:<24} ({was}: {other})" for name, value, other in rows]


def _line(item: Field, value: Any, resolved: Any) -> str:
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
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _has_no_text(value: Any) -> bool:
    """Whether a text holds bytes that are no UTF-8, as a path may."""
    return any("\ud800" <= letter <= "\udfff" for one in (value if isinstance(value, tuple) else (value,))
               if isinstance(one, str) for letter in one)
