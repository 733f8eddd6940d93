"""Refuses to start from random weights in a folder that holds, or held, something else than a run that begins."""

import re
from contextlib import suppress
from pathlib import Path

from megatron.checkpoint.places import BEST, BOARD, CONFIG_FILE, LATEST, LOSSES, METRICS_FILE, iterations
from megatron.config import CheckpointConfig
from megatron.errors import CheckpointError

# What the folder of a run without a checkpoint may hold, besides hidden files: our files, and redirected output.
_OURS = (CONFIG_FILE, LOSSES, "mlflow", "profile", BOARD, "trackers.json", "wandb")
_OUTPUT_ENDINGS = (".log", ".out", ".err", ".txt", ".prom")


def refuse_lost_run(folder: Path) -> None:
    """Raises CheckpointError if a run in `folder` has saved checkpoints and none is there: what is left of it, such as
    its metrics, would be overwritten.

    A run that ended before its first save has left no pointer, and may begin again.
    """
    if iterations(folder):
        return
    text = ""
    with suppress(OSError):
        text = (folder / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch("[0-9]{1,18}", text) and not (folder / BEST).is_symlink():
        return
    told = f"{LATEST} names iteration {int(text)}" if text.isdecimal() else f"{BEST} names {(folder / BEST).readlink()}"
    raise CheckpointError(f"--save {folder} held a run, whose checkpoints are gone ({told}); copy them back, or give "
                          "another --save (of the scripts CHECKPOINT_PATH) to begin anew")


def check_fresh_start(config: CheckpointConfig, is_same_run: bool) -> None:
    """Raises CheckpointError where a `--load` without a checkpoint is not the new folder of a run that starts."""
    assert config.load is not None
    strangers = _strangers(Path(config.load))
    if config.finetune or not is_same_run or strangers:
        found = f"{strangers[0]} but no checkpoint" if strangers else "no checkpoint"
        raise CheckpointError(f"--load {config.load} holds {found}; give the folder that a run was saved in, or to "
                              "start afresh leave --load out, or give --load and --save the same new folder")


def _strangers(folder: Path) -> list[str]:
    """The names in a folder that a run without a checkpoint would not have put there."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if METRICS_FILE in names:  # a run has begun here
        return []
    return [name for name in names if name not in _OURS and not name.startswith((".", "abandoned-"))
            and not name.endswith(_OUTPUT_ENDINGS)]
