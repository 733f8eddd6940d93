"""What lies where in the folder of a run, and what its checkpoints say without being opened; this needs no PyTorch."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

# In the folder of a run.
LATEST, BEST = "latest_checkpointed_iteration.txt", "best"
CONFIG_FILE, METRICS_FILE = "config.toml", "metrics.jsonl"
LOSSES, BOARD, SPIKES = "loss.png", "tensorboard", "spikes"
# In that of a checkpoint.
STATE, VALIDATION = "state.json", "validation.json"
_BESIDE_WEIGHTS = re.compile(r"(optimizer|ema).*|.*\.(json|jsonl|txt|toml|md)")  # what may change while they do not


def place_of(root: Path, iteration: int) -> Path:
    """The folder of the checkpoint of an iteration."""
    return root / f"iter_{iteration:07d}"


def iterations(root: Path) -> dict[int, Path]:
    """The folders of checkpoints below `root` by their numbers, ascending."""
    places = {int(place.name[5:]): place for place in root.glob("iter_*") if re.fullmatch("[0-9]{7,}", place.name[5:])}
    return dict(sorted(places.items()))


def digest_of_weights(path: Path) -> str:
    """Tells whether the weights at a checkpoint's path, a file or a folder, are still the same: by names, sizes, times.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files
             if not _BESIDE_WEIGHTS.fullmatch(file.name)]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest()


def validation_loss(place: Path) -> float | None:
    """That of the run when it wrote this checkpoint; None where it is not known."""
    found = _validation(place)
    return None if found is None else found["loss"]


def validations(root: Path) -> dict[Path, dict[str, Any]]:
    """Of the checkpoints below `root` whose validation is known, ascending: its "loss", and what that is of."""
    return {place: found for place in iterations(root).values() if (found := _validation(place)) is not None}


def _validation(place: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((place / VALIDATION).read_text(encoding="utf-8"))
        return {**found, "loss": float(found["loss"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
