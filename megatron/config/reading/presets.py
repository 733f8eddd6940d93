"""The presets by name, each with the values of its file and of those that it extends.

The files are those of `megatron/config/presets/`, whose docstring says how they are written.
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
FOLDER = Path(__file__).parents[1] / "presets"


@cache
def _files() -> Mapping[str, Path]:
    """The file of each preset and base by name; families in alphabetical order, in each the smaller models first."""
    def place(path: Path) -> tuple[str, bool, str, bool, int]:
        name, number, unit = re.fullmatch(r"(.*?)(?:-(\d+)([mb]))?", path.stem).groups()  # type: ignore[union-attr]
        return path.parent.name, number is not None, name, unit == "b", int(number or 0)

    return {path.stem: path for path in sorted(FOLDER.glob("*/*.toml"), key=place)}


@cache
def _values(name: str) -> Mapping[str, Any]:
    """The values of a preset, with those of the one that it extends, by field name."""
    values = read_file(_files()[name], _files())
    below = values.pop("preset", None)
    return overlaid(_values(below) if below else {}, values)
