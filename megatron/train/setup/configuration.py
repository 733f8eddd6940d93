"""Writes a run's configuration into its folder, for people to read and for `--config` to load.

SAVE/config.toml         the configuration of the newest start
SAVE/config-1.toml, …    the earlier, different ones, oldest first
SAVE/config_changes.txt  how the first start differs from the preset, and each later one from the start before it
"""

import itertools
import sys
from pathlib import Path

from megatron.checkpoint.places import CONFIG_FILE
from megatron.config import Config
from megatron.config.command_line import Resolved
from megatron.config.reading.files import read_file
from megatron.config.reading.presets import PRESETS
from megatron.config.telling.as_toml import as_toml, changes, unwritable, written
from megatron.errors import ConfigError, OutputError
from megatron.files import write_text

CHANGES = "config_changes.txt"


def write_configuration(resolved: Resolved) -> None:
    """Write the file of `--write-config`, or print it if that is "-"; raises ConfigError where it cannot be written."""
    name, text = resolved.given.write_config or "", _text(resolved)
    if name == "-":
        sys.stdout.write(text)
        return
    path = Path(name)
    if path.suffix != ".toml":
        raise ConfigError(f"--write-config {name} would hold TOML; let its name end in .toml")
    if flags := unwritable(resolved.plain):
        raise ConfigError(f"--write-config {name} cannot hold {flags[0]}, whose path is no UTF-8; leave it out")
    if path.exists():  # it may have been edited
        raise ConfigError(f"--write-config {name} is there already; give another name, or remove it")
    try:
        write_text(path, text)
    except OSError as error:
        raise ConfigError(f"--write-config {name} cannot be written ({error.strerror}); name a file in a folder that "
                          "is there") from None


def keep_configuration(resolved: Resolved, iteration: int) -> None:
    """Record in `--save` the configuration of a start that begins at `iteration`; raises OutputError.

    Only the process that holds the claim on the folder calls this.
    """
    folder = Path(resolved.config.checkpoint.save)
    path, now = folder / CONFIG_FILE, written(resolved.plain, resolved.config)
    try:
        if not path.exists():
            rows = [f"from iteration {iteration} on: {resolved.origin}",
                    *changes(now, resolved.base(), "preset" if resolved.given.preset else "default")]
        else:
            before = _before(path)
            lines = changes(now, before, "before") if before is not None else ["  (the one before is damaged)"]
            if not lines:
                return
            names = (folder / f"config-{number}.toml" for number in itertools.count(1))
            earlier = next(name for name in names if not name.exists())
            rows = [f"from iteration {iteration} on, in place of what {earlier.name} has: {resolved.origin}", *lines]
            path.rename(earlier)
        write_text(path, _text(resolved))
        with (folder / CHANGES).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\n".join([*rows, "", ""]))
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror or error}); checkpoints are untouched. Make "
                          f"room, or give another folder than --save {folder}") from error


def _text(resolved: Resolved) -> str:
    return as_toml(resolved.plain, resolved.config, resolved.origin)


def _before(path: Path) -> dict | None:
    """The flags' values in the file of an earlier start; None if it cannot be read."""
    try:
        return Config().as_dict() | read_file(path, PRESETS)
    except ConfigError:
        return None
