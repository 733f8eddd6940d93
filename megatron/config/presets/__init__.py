"""Presets, named sets of flags: published models with their hyperparameters, and small models for CPUs.

A preset is a file FAMILY/NAME.toml in the format of `--config`. If it names another preset, it extends that one. Files
whose names begin with _ only serve as such bases, and cannot be chosen by users.

Families: `bert/` (ProteinLM, TAPE's transformer, ProtBERT), `esm/` (ESM-1b, ESM-2), `recipe/` (this project's own).
"""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from megatron.config.reading.files import read_file
from megatron.config.reading.layers import overlaid


class _Presets(Mapping[str, dict[str, Any]]):
    """The values of each preset by field name; its file is read on first use."""

    def __getitem__(self, name: str) -> dict[str, Any]:
        if name not in self:
            raise KeyError(name)
        return dict(_values(name))

    def __contains__(self, name: object) -> bool:
        return name in _files() and not str(name).startswith("_")

    def __iter__(self) -> Iterator[str]:
        return (name for name in _files() if name in self)

    def __len__(self) -> int:
        return len(list(iter(self)))


PRESETS: Mapping[str, dict[str, Any]] = _Presets()


@cache
def _files() -> Mapping[str, Path]:
    """The file of each preset and base by name; families in alphabetical order, in each the smaller models first."""
    def place(path: Path) -> tuple[str, bool, str, bool, int]:
        name, number, unit = re.fullmatch(r"(.*?)(?:-(\d+)([mb]))?", path.stem).groups()  # type: ignore[union-attr]
        return path.parent.name, number is not None, name, unit == "b", int(number or 0)

    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*/*.toml"), key=place)}


@cache
def _values(name: str) -> Mapping[str, Any]:
    """The values of a preset, with those of the one that it extends, by field name."""
    values = read_file(_files()[name], _files())
    below = values.pop("preset", None)
    return overlaid(_values(below) if below else {}, values)
