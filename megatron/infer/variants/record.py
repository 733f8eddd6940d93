"""The folder of what was scored: what is done in it, so that a killed program goes on with what is left."""

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
    """What a folder's SUMMARY tells of each of its ASSAYS and PROTEINS, by their names; it appears whole.

    A thing is done once it is told of, which is after its files were written. `settings` are what scores depend on
    besides: a folder of others is refused. One process writes; any may read before it does.
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
        """Whether that is there, made of what has this identity."""
        return self._held[kind].get(name, {}).get("identity") == identity

    def tell(self, kind: str, name: str, facts: Mapping[str, Any]) -> None:
        """Put down facts, `identity` among them, beside what is known already, and write the summary."""
        self._held[kind][name] = self._held[kind].get(name, {}) | dict(facts)
        write_json(self._path, self._held | {"average": self.average()})

    def assays(self) -> dict[str, dict[str, Any]]:
        """The facts of each assay."""
        return self._held[ASSAYS]

    def average(self) -> dict[str, Any]:
        """That of all assays, as `averaged` gives it."""
        return averaged(list(self.assays().values()))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: dict(found[name]) for name in ("settings", ASSAYS, PROTEINS)}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: is no summary of scores; give another folder") from None
