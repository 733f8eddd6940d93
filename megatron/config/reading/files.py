"""A configuration in a file: keys are flags without their dashes, flat or in a table a section, in TOML or YAML.

    preset = "demo"          # above the tables; the file's other values win over it
    [model]
    hidden-size = 256

A value is checked as its flag is. Every mistake is a ConfigFileError of one line that names the file and the key.
"""

import difflib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import Field, fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron.config import Config
from megatron.config.declaration import can_be_off, flag_name, is_switch
from megatron.config.reading.checks import check_value
from megatron.config.reading.megatron_flags import ALWAYS_SO, REFUSED
from megatron.errors import ConfigError, ConfigFileError

YAML_ENDINGS = (".yaml", ".yml")  # what ends otherwise is TOML
_EXPECTED = {int: "a whole number", float: "a number", str: "text"}
_Key = tuple[Field, str, bool]  # a flag, its section, and whether the key is its --no-


def read_file(path: Path, presets: Collection[str]) -> dict[str, Any]:
    """What a file says, by the fields' names, with "preset" where it names one; flags that are always so by their own.

    `presets`: those that it may name. Raises ConfigFileError.
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
    """The first of the modules that is installed; raises ModuleNotFoundError for the last."""
    for name in names[:-1]:
        try:
            return import_module(name)
        except ModuleNotFoundError:
            continue
    return import_module(names[-1])


def _yaml(text: str) -> Any:
    """The tree of a YAML text; raises ValueError, for a key that comes twice as well, of which YAML keeps the last."""
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
    """Each table, key and value; the table is None for a key above the tables."""
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
    """The field's name and the value of a key; raises ConfigFileError."""
    if key == "preset" and table is None:
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
    """The flag that a key means, for all spellings of it."""
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
    """What the flag takes of a value in a file; raises ConfigFileError."""
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
    kind, choices = item.metadata["type"], item.metadata["choices"]
    is_right = isinstance(found, (str, int, float)) and not isinstance(found, bool) and not (
        kind is int and isinstance(found, float))
    try:  # YAML reads 1e-3 as text; on the command line all is text
        value = kind(found) if is_right else None
    except (ValueError, OverflowError):
        value = None
    if choices is not None:
        return _choice(found if value is None else value, choices, where)
    if value is None:
        raise ConfigFileError(f"{where} is {_shown(found)}; it must be {_EXPECTED[kind]}")
    return value


def _choice(found: Any, choices: Collection[Any], where: str) -> Any:
    if found not in choices:
        raise ConfigFileError(f"{where} is {_shown(found)}; it must be one of {', '.join(map(str, choices))}"
                          f"{_nearest(str(found), list(map(str, choices)))}")
    return found


def _nearest(name: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _shown(found: Any) -> str:
    text = str(found).lower() if isinstance(found, bool) else repr(found)
    return text if len(text) <= 60 else f"{text[:57]}…"
