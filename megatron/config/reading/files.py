"""Reads a configuration file in TOML or YAML: keys are flags without their dashes, flat or in a table for each section.

    preset = "demo"          # above the tables; the file's other values override it
    [model]
    hidden-size = 256

Values are checked like those of flags. Every mistake raises a ConfigFileError of one line with the file and the key.
"""

import difflib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import Field, fields
from datetime import date, time
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron.config import Config
from megatron.config.declaration import can_be_off, flag_name, is_switch
from megatron.config.reading.checks import check_value
from megatron.config.reading.megatron_flags import ALWAYS_SO, REFUSED
from megatron.errors import ConfigError, ConfigFileError

YAML_ENDINGS = (".yaml", ".yml")  # any other file is TOML
_EXPECTED = {int: "a whole number", float: "a number", str: "text"}
_Key = tuple[Field, str, bool]  # a flag, its section, and whether the key is its --no-


def read_file(path: Path, presets: Collection[str]) -> dict[str, Any]:
    """The values in a file by field name, with the key "preset" if it names one.

    Flags without effect (ALWAYS_SO) are keyed by their names. `presets`: the known ones. Raises ConfigFileError.
    """
    values: dict[str, Any] = {}
    said: dict[str, str] = {}
    for table, key, found in _entries(_tree(path), path):
        where = f"{path}: {f'[{table}] ' if table else ''}{key}"
        name, value = _entry(table, key.replace("_", "-"), found, where, presets)
        if name in values:
            raise ConfigFileError(f"{where} says again what {said[name]} said; keep one of the two")
        values[name], said[name] = value, key
    if not values:
        raise ConfigFileError(f"{path} says nothing; give it keys such as hidden-size = 256, or leave --config out")
    return values


def _tree(path: Path) -> Any:
    """The parsed content of a TOML or YAML file; raises ConfigFileError."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigFileError(f"--config {path} cannot be read ({error.strerror}); give a file of TOML or "
                              "YAML") from None
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise ConfigFileError(f"{path}: line {line} is not UTF-8; save it as that") from None
    try:
        return _yaml(text) if path.suffix.lower() in YAML_ENDINGS else _module("tomllib", "tomli").loads(text)
    except ModuleNotFoundError as error:
        needed = "YAML needs the package PyYAML" if error.name == "yaml" else (
            "before Python 3.11 TOML needs the package tomli")
        raise ConfigFileError(f"{path} cannot be read: {needed}; install it with pip") from None
    except (ValueError, RecursionError) as error:
        kind = "YAML" if path.suffix.lower() in YAML_ENDINGS else "TOML (YAML ends in .yaml)"
        raise ConfigFileError(f"{path} is no {kind}: {' '.join(str(error).split())}") from None


def _module(*names: str) -> Any:
    """The first of the modules that is installed; raises ModuleNotFoundError, for the last name, if none is."""
    for name in names[:-1]:
        try:
            return import_module(name)
        except ModuleNotFoundError:
            continue
    return import_module(names[-1])


def _yaml(text: str) -> Any:
    """The parsed YAML text; raises ValueError, also for a repeated key, of which PyYAML would keep the last."""
    yaml = _module("yaml")

    loader: Any = type("Loader", (yaml.SafeLoader,), {})

    def mapping(construct: Any, node: Any) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key.value, str)]
        if twice := [key for key in names if names.count(key) > 1]:
            raise ValueError(f"the key {twice[0]} is there twice (line {node.start_mark.line + 1} and below)")
        return construct.construct_mapping(node, deep=True)

    loader.add_constructor("tag:yaml.org,2002:map", mapping)
    try:
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _entries(tree: Any, path: Path) -> Iterator[tuple[str | None, str, Any]]:
    """Each entry as (table, key, value); the table is None for a key above the tables. Raises ConfigFileError."""
    if not isinstance(tree, dict):
        if tree is None:
            return
        raise ConfigFileError(f"{path} holds {_shown(tree)}; it must be keys with values, such as hidden-size: 256")
    sections = [name for name, _ in Config().sections()]
    for name, content in tree.items():
        if not isinstance(content, dict):
            yield None, str(name), content
            continue
        if name not in sections:
            hint = _nearest(str(name), sections) or f"; they are {', '.join(sections)}"
            raise ConfigFileError(f"{path}: [{name}] is no section{hint}")
        for key, found in content.items():
            if isinstance(found, dict):
                raise ConfigFileError(f"{path}: [{name}.{key}] is a table in a section; write {key} = VALUE in "
                                      f"[{name}]")
            yield name, str(key), found


def _entry(table: str | None, key: str, found: Any, where: str, presets: Collection[str]) -> tuple[str, Any]:
    """The field name and the value of an entry; `where`: the entry, for messages. Raises ConfigFileError."""
    if key == "preset":
        if table is not None:
            raise ConfigFileError(f"{where} is of no section; write it above all tables")
        return key, _choice(found, list(presets), where)
    if f"--{key}" in ALWAYS_SO:
        if found is not True:
            raise ConfigFileError(f"{where} is {_shown(found)}; it is always true: {ALWAYS_SO[f'--{key}']}")
        return f"--{key}", True
    if f"--{key}" in REFUSED:
        raise ConfigFileError(f"{where} cannot be used: {REFUSED[f'--{key}']}")
    if key not in _keys():
        near = _nearest(key, ["preset", *_keys()])
        raise ConfigFileError(f"{where} is no flag{near or '; pretrain_tape.py --help-all lists them'}")
    item, section, is_negated = _keys()[key]
    if table not in (None, section):
        raise ConfigFileError(f"{where} is of another section; write it in [{section}], or above all tables")
    value = _value(item, found, where)
    try:
        check_value(item, value, where)
    except ConfigError as error:
        raise ConfigFileError(str(error)) from None
    return item.name, (not value) if is_negated else value


@cache
def _keys() -> Mapping[str, _Key]:
    """The flag for each possible key, aliases and --no- included."""
    found: dict[str, _Key] = {}
    for section, values in Config().sections():
        for item in fields(values):
            for name in (flag_name(item), *item.metadata["aliases"]):
                key = name.removeprefix("--").replace("_", "-")
                found[key] = item, section, False
                if can_be_off(item):
                    found[f"no-{key}"] = item, section, True
    return found


def _value(item: Field, found: Any, where: str) -> Any:
    """A value in a file converted to the flag's type; raises ConfigFileError."""
    nargs = item.metadata["nargs"]
    if is_switch(item):
        if not isinstance(found, bool):
            raise ConfigFileError(f"{where} is {_shown(found)}; it must be true or false")
        return found
    if nargs is None:
        return _one(item, found, where)
    values = found if isinstance(found, list) else [found]
    if len(values) != nargs if isinstance(nargs, int) else not values:
        expected = "one or more" if nargs == "+" else nargs
        raise ConfigFileError(f"{where} is {_shown(found)}; it must be a list of {expected}")
    return tuple(_one(item, one, where) for one in values)


def _one(item: Field, found: Any, where: str) -> Any:
    """A single value, or one of a list, converted to the flag's type; raises ConfigFileError."""
    kind, choices = item.metadata["type"], item.metadata["choices"]
    is_right = isinstance(found, (str, int, float)) and not isinstance(found, bool) and not (
        kind is int and isinstance(found, float))
    try:  # text is converted too, since YAML reads 1e-3 as text
        value = kind(found) if is_right else None
    except (ValueError, OverflowError):
        value = None
    if choices is not None:
        return _choice(found if value is None else value, choices, where)
    if value is None:
        raise ConfigFileError(f"{where} is {_shown(found)}; it must be {_EXPECTED[kind]}")
    return value


def _choice(found: Any, choices: Collection[Any], where: str) -> Any:
    """The value, if it is one of `choices`; raises ConfigFileError otherwise."""
    if found not in choices:
        raise ConfigFileError(f"{where} is {_shown(found)}; it must be one of {', '.join(map(str, choices))}"
                          f"{_nearest(str(found), list(map(str, choices)))}")
    return found


def _nearest(name: str, names: Collection[str]) -> str:
    """The end of a message that suggests a similar name, or nothing."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _shown(found: Any) -> str:
    """A value of the file as text for a message, shortened."""
    is_plain = isinstance(found, bool | date | time)  # Python's forms of these are not the file's
    text = "empty" if found is None else str(found).lower() if is_plain else repr(found)
    return text if len(text) <= 60 else f"{text[:57]}…"
