"""The names of the files in a run's folder and in its checkpoints, and what can be read of them without PyTorch."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

# Files in a run's folder.
LATEST, BEST = "latest_checkpointed_iteration.txt", "best"
CONFIG_FILE, METRICS_FILE = "config.toml", "metrics.jsonl"
LOSSES, BOARD, SPIKES = "loss.png", "tensorboard", "spikes"
# Files in a checkpoint's folder.
STATE, VALIDATION = "state.json", "validation.json"
_BESIDE_WEIGHTS = re.compile(r"(optimizer|ema).*|.*\.(json|jsonl|txt|toml|md)")  # may change while the weights stay


def place_of(root: Path, iteration: int) -> Path:
    """The folder of an iteration's checkpoint below the run's folder `root`."""
    return root / f"iter_{iteration:07d}"


def iterations(root: Path) -> dict[int, Path]:
    """The checkpoint folders below `root`, by iteration, in ascending order."""
    places = {int(place.name[5:]): place for place in root.glob("iter_*") if re.fullmatch("[0-9]{7,}", place.name[5:])}
    return dict(sorted(places.items()))


def digest_of_weights(path: Path) -> str:
    """A digest that changes when the weights at `path`, a file or a folder, change.

    It is computed from names, sizes and modification times; the contents are not read.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files
             if not _BESIDE_WEIGHTS.fullmatch(file.name)]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest()


def validation_loss(place: Path) -> float | None:
    """The validation loss at a checkpoint, in nats; None if it was not recorded."""
    found = _validation(place)
    return None if found is None else found["loss"]


def validations(root: Path) -> dict[Path, dict[str, Any]]:
    """The content of validation.json ("loss", "measured_on") of each checkpoint below `root` that has one, in order."""
    return {place: found for place in iterations(root).values() if (found := _validation(place)) is not None}


def _validation(place: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((place / VALIDATION).read_text(encoding="utf-8"))
        return {**found, "loss": float(found["loss"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
