"""The command line: derived from `megatron.config`, and parsed once into a frozen `Config`.

A value is taken from the flags if given there, else from the file of `--config`, else from the preset, else it is the
field's default. What cannot be honoured raises ConfigError with the flag, its value and the remedy.
"""

import argparse
import difflib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NoReturn

from megatron.config import Config
from megatron.config.data import VOCABULARIES
from megatron.config.declaration import flag_name, with_tuples
from megatron.config.reading.checks import check_heads, check_section, filled, plain
from megatron.config.reading.files import read_file
from megatron.config.reading.layers import overlaid
from megatron.config.reading.megatron_flags import ALWAYS_SO, REFUSED
from megatron.config.reading.parser import HelpLines, OneLineParser, add_section_flags
from megatron.config.reading.presets import PRESETS
from megatron.config.reading.sources import Sources
from megatron.config.telling.completion import SHELLS, completion
from megatron.config.telling.help import DESCRIPTION, EXAMPLES, USAGE, short_help
from megatron.errors import ConfigError

__all__ = ["Given", "OneLineParser", "Resolved", "add_section_flags", "as_flags", "check_section", "flag_name",
           "left_open", "parse", "read", "resolve"]

_SECTIONS: tuple[type, ...] = (Sources, *(type(section) for _, section in Config().sections()))


@dataclass(frozen=True)
class Given:
    """What a command line says, as it was given."""

    preset: str | None  # the name of the preset
    file: str | None  # the path of the file of --config
    of_file: Mapping[str, Any]  # the values in that file, by field name
    of_flags: Mapping[str, Any]  # the values of the flags, by field name
    always_so: tuple[str, ...]  # flags of Megatron-LM that were given and have no effect
    write_config: str | None  # the path to write the configuration to

    @cached_property
    def said(self) -> Mapping[str, Any]:
        """The values of the file and the flags together, by field name."""
        return overlaid(self.of_file, self.of_flags)

    @property
    def of_preset(self) -> Mapping[str, Any]:
        """The values of the preset, by field name."""
        return PRESETS[self.preset] if self.preset else {}


@dataclass(frozen=True)
class Resolved:
    """A command line and its configuration; `plain` is the same without values derived from others."""

    given: Given
    plain: Config
    config: Config

    @property
    def origin(self) -> str:
        """Where the values come from, for people, such as "preset demo, flags"."""
        preset, file = self.given.preset, self.given.file
        return ", ".join([f"preset {preset}" if preset else "defaults", *([f"file {file}"] if file else []),
                          *(["flags"] if self.given.of_flags else [])])

    def base(self) -> dict[str, Any]:
        """The values of all flags by field name, if only the preset (or no preset) had been given."""
        return plain(self.given.of_preset).as_dict()


def parse(argv: Sequence[str], taken: Mapping[str, Any] | None = None) -> tuple[Config, tuple[str, ...]]:
    """The configuration that `argv` describes, and the flags in it that have no effect (ALWAYS_SO).

    `taken`: values by field name that replace defaults, but not what flags, the file or the preset say. Raises
    ConfigError.
    """
    resolved = resolve(argv, taken)
    if resolved.given.write_config is not None:
        raise ConfigError(f"--write-config {resolved.given.write_config} is of pretrain_tape.py alone, which then "
                          "ends; leave it out")
    return resolved.config, resolved.given.always_so


def resolve(argv: Sequence[str], taken: Mapping[str, Any] | None = None) -> Resolved:
    """The configuration that `argv` describes, with what was given; `taken` is as in `parse`. Raises ConfigError."""
    given = read(argv)
    values = overlaid(taken or {}, overlaid(given.of_preset, given.said))
    config = filled(plain(values))
    for name in taken or {}:  # drop values that the others imply anyway
        less = {other: value for other, value in values.items() if other != name}
        with suppress(ConfigError):
            values = less if filled(plain(less)) == config else values
    return Resolved(given, plain(values), config)


def left_open(argv: Sequence[str], saved: Callable[[str], Mapping[str, Any]]) -> dict[str, Any]:
    """The model's flags in the checkpoint of `--load` that `argv` does not give, by field name.

    These are the flags whose `Changes` are arithmetic, dropout or vocabulary; the last only if the vocabulary's file
    exists here. Without a checkpoint in `--load`, that of `--save` is used, which may continue it. `saved`: gives the
    flags of the checkpoint in a folder. Raises ConfigError, and CheckpointError if neither `argv` nor the checkpoint
    says the number of attention heads.
    """
    found = read(argv)
    values = found.said
    folders = [values[name] for name in ("load", "save") if name in values] if "load" in values else []
    place, known = next(filter(lambda pair: pair[1], ((folder, saved(folder)) for folder in folders)), ("", {}))
    given = values.keys() | found.of_preset.keys()
    if "hidden_size" in known and "num_attention_heads" not in given:
        check_heads(known, place)
    file = values.get("vocab_file", known.get("vocab_file"))
    is_here = file is None or file in VOCABULARIES or Path(str(file)).exists()
    kinds = {"arithmetic", "dropout", *(["vocabulary"] if is_here else [])}
    return {item.name: known[item.name] for _, section in Config().sections() for item in fields(section)
            if item.metadata["changes"] in kinds and item.name in known and item.name not in given}


def as_flags(argv: Sequence[str]) -> list[str]:
    """`argv` with the file of `--config` replaced by flags, which come first; those that `argv` overrides are left out.

    For programs that look at flags or store them, since the file may change later. Raises ConfigError.
    """
    if not any(_name(word) == "--config" for word in argv):
        return list(argv)
    given = read(argv)
    items = {item.name: item for _, section in Config().sections() for item in fields(section)}
    words = [word for name, value in given.said.items() if name not in given.of_flags
             for word in _words(flag_name(items[name]), value)]
    at = next(index for index, word in enumerate(argv) if _name(word) == "--config")
    rest = [*argv[:at], *argv[at + (1 if "=" in argv[at] else 2):]]
    return [*(["--preset", given.preset] if given.preset else []), *words, *rest]


def _name(word: str) -> str:
    """The flag's name in a word of the command line, without its `=VALUE`."""
    return word.split("=")[0]


def _words(name: str, value: Any) -> list[str]:
    """The words of the command line that set a flag to a value."""
    if isinstance(value, bool):
        return [name if value else f"--no-{name.removeprefix('--')}"]
    return [name, *map(str, value)] if isinstance(value, tuple) else [f"{name}={value}"]


class _Print(argparse.Action):
    """An action that prints `const(value of the flag)` and ends the program."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        print(self.const(values), end="")
        parser.exit()


@cache
def _parser() -> OneLineParser:
    parser = OneLineParser(prog="pretrain_tape.py", usage=USAGE, description=DESCRIPTION, formatter_class=HelpLines,
                           allow_abbrev=False, add_help=False)
    for section in _SECTIONS:
        add_section_flags(parser, section)
    always = parser.add_argument_group("always so", "Flags of Megatron-LM that are accepted and change nothing.")
    for name, reason in ALWAYS_SO.items():
        always.add_argument(name, dest=name, action="store_true", default=argparse.SUPPRESS, help=reason)
    about = parser.add_argument_group("about")
    for names, text, answer in (
            (("-h", "--help"), "the commonest flags", lambda _: short_help(_SECTIONS)),
            (("--help-all",), "all flags", lambda _: parser.format_help() + EXAMPLES)):
        about.add_argument(*names, action=_Print, nargs=0, const=answer, help=text, default=argparse.SUPPRESS)
    about.add_argument("--completion", action=_Print, choices=SHELLS, const=completion, default=argparse.SUPPRESS,
                       help="print a script with which the shell completes flags and their values")
    return parser


def read(argv: Sequence[str]) -> Given:
    """What `argv` says, before defaults and checks; raises ConfigError."""
    parser = _parser()
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        _refuse(unknown[0], parser)
    if sum(_name(word) == "--config" for word in argv) > 1:
        raise ConfigError("--config is given twice; put the values into one file")
    values = with_tuples(vars(found))
    file = values.pop("config", None)
    of_file = read_file(Path(file), PRESETS) if file is not None else {}
    always_so = tuple(flag for flag in ALWAYS_SO if values.pop(flag, False) | of_file.pop(flag, False))
    preset = of_file.pop("preset", None)
    return Given(values.pop("preset", preset), file, of_file, values, always_so, values.pop("write_config", None))


def _refuse(text: str, parser: argparse.ArgumentParser) -> NoReturn:
    """Raises ConfigError for an unknown flag, with the reason or a similar name."""
    name = _name(text)
    if name in REFUSED:
        raise ConfigError(f"{name} cannot be used: {REFUSED[name]}")
    known = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else "; --help-all lists the flags"
    raise ConfigError(f"unknown argument {name}{hint}")
