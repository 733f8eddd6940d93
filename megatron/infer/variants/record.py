"""The record of an output folder: which files are scored, so that a killed run continues with the others."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.errors import ConfigError, DataError
from megatron.files import write_json
from megatron.infer.variants.averages import averaged

SUMMARY = "summary.json"
ASSAYS, PROTEINS = "assays", "proteins"  # files that were scored; proteins all of whose substitutions were


class ScoringRecord:
    """The contents of SUMMARY in a folder: facts about each of its ASSAYS and PROTEINS, by name.

    The file is replaced as a whole. An entry counts as done once it is recorded, which happens after its files are
    written. `settings` are what all scores depend on: a folder with other settings raises ConfigError. One process may
    write; any may read before that.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self._path = folder / SUMMARY
        self._held: dict[str, Any] = {"settings": dict(settings), ASSAYS: {}, PROTEINS: {}}
        if self._path.exists():
            self._held = _read(self._path)
            for name, value in settings.items():
                if (there := self._held["settings"].get(name)) != value:
                    raise ConfigError(f"{folder}: its scores are of {name} {there}, and {value} is asked for; "
                                      "give another folder")

    def is_done(self, kind: str, name: str, identity: str) -> bool:
        """Whether this entry is recorded with this identity."""
        return self._held[kind].get(name, {}).get("identity") == identity

    def tell(self, kind: str, name: str, facts: Mapping[str, Any]) -> None:
        """Record facts, including `identity`, in addition to those already known, and write the summary."""
        self._held[kind][name] = self._held[kind].get(name, {}) | dict(facts)
        write_json(self._path, self._held | {"average": self.average()})

    def assays(self) -> dict[str, dict[str, Any]]:
        """The facts about each assay, by name."""
        return self._held[ASSAYS]

    def average(self) -> dict[str, Any]:
        """The averages over all assays, as `averaged` computes them."""
        return averaged(list(self.assays().values()))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: dict(found[name]) for name in ("settings", ASSAYS, PROTEINS)}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: is no summary of scores; give another folder") from None
