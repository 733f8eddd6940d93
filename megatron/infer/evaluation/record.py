"""The file of evaluations, in which results of several models on the same proteins accumulate."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.errors import ConfigError, DataError
from megatron.files import write_json

FILE = "evaluation.json"
_SETTINGS = "settings"  # of a report: what figures depend on besides the model

Report = dict[str, Any]


class EvaluationRecord:
    """The contents of FILE in a folder: for each corpus, by name, the report of each model (see `TargetTally.report`).

    One process may write; any may read before that. Raises DataError if the file was written by another program.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._reports = _read(self.path) if self.path.exists() else {}

    def check(self, settings_of: Mapping[str, Mapping[str, Any]]) -> None:
        """Raises ConfigError if a model was evaluated on one of these corpora with other settings."""
        for corpus, settings in settings_of.items():
            for model, report in self._reports.get(corpus, {}).items():
                there = report.get(_SETTINGS, {})
                if differing := [name for name, value in settings.items() if there.get(name) != value]:
                    raise ConfigError(f"{self.path}: {model} was evaluated on {corpus} with other "
                                      f"{', '.join(differing)}: its figures cannot stand beside these; give another "
                                      "--output")

    def tell(self, corpus: str, model: str, report: Report, settings: Mapping[str, Any], writes: bool) -> None:
        """Store a model's report in place of its previous one, and write the file if `writes`."""
        self._reports.setdefault(corpus, {})[model] = report | {_SETTINGS: dict(settings)}
        if writes:
            write_json(self.path, self._reports)

    def of(self, corpus: str) -> dict[str, Report]:
        """The reports on a corpus, by model name."""
        return self._reports[corpus]


def _read(path: Path) -> dict[str, dict[str, Report]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {corpus: {model: dict(report) for model, report in of_models.items()}
                for corpus, of_models in found.items()}
    except (ValueError, AttributeError, TypeError):
        raise DataError(f"{path}: is not of this program; give another --output") from None
