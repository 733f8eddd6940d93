"""The checkpoints in a run's folder: finding the one to resume from, and removing old ones.

FOLDER/latest_checkpointed_iteration.txt    the iteration of the newest, as decimal text
FOLDER/best                                 a link to the one with the lowest validation loss on the same data
FOLDER/iter_0000100/model-00000.safetensors, optimizer-00000.safetensors    what rank 0 wrote, fp32
FOLDER/iter_0000100/ema-00000.safetensors   the average of the weights, fp32, of a run with --ema
FOLDER/iter_0000100/state.json              progress, loss scale, meters, the flags of the run
FOLDER/iter_0000100/manifest.json           all files with their checksums, and where each tensor is stored
FOLDER/iter_0000100/validation.json         the validation loss, if known, and the data that it was measured on

No file is a pickle, so opening a checkpoint runs no code. A checkpoint's folder gets its name when it is complete. The
pointer, latest_checkpointed_iteration.txt, is written after that, so it may lag behind or be missing. It is obeyed only
if it is newer than all checkpoints, as when a user edits it to go back to an older iteration.
"""

import itertools
import json
import re
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from megatron.checkpoint.claim import LOCK
from megatron.checkpoint.contents import Checkpoint
from megatron.checkpoint.manifest import MANIFEST, check_files, read_manifest
from megatron.checkpoint.metrics import MEASURED_ON, comparable
from megatron.checkpoint.places import BEST, LATEST, STATE, VALIDATION, iterations, place_of, validations
from megatron.checkpoint.whole import MODEL, read_whole
from megatron.errors import CheckpointError
from megatron.files import left_over, remains, write_json, write_text
from megatron.log import Log
from megatron.parallel.collectives import all_gather_object
from megatron.parallel.mesh import Axis

ABANDONED_S = 3600.0  # a temporary file that nobody has written to for so long is nobody's
# Files that only the process with the folder's lock writes.
_OF_HOLDER = re.compile(r"(metrics\.jsonl|config(-\d+)?\.toml|trackers\.json|latest_checkpointed_iteration\.txt|"
                        r"(validation|manifest)\.json)")
WithOptimizer = bool | Callable[[Mapping[str, Any]], bool]  # a predicate gets the content of state.json


def find(folder: str, world: Axis, log: Log, with_optimizer: WithOptimizer = True) -> Checkpoint | None:
    """The checkpoint to resume from, the same on all ranks, which call this together; None if there is none.

    A damaged checkpoint is skipped for the previous one, with a line in the log that says why. `folder` may also be a
    single checkpoint, such as RUN/best, but only without the optimizer's state: to resume training, name the run's
    folder. Raises CheckpointError if all checkpoints are damaged, or if some ranks cannot see them.
    """
    root = Path(folder)
    if _is_one(root):
        if with_optimizer:
            raise CheckpointError(f"{folder} is one checkpoint, not the folder of a run; give {root.resolve().parent}")
        return on_all(partial(_opened, root.resolve(), world, log, with_optimizer), world)
    note, places = in_order(root)
    names = all_gather_object([place.name for place in places], world)[0]
    if note is not None:
        log.line(note)
    why = None
    for name in names:
        try:
            return on_all(partial(_opened, root / name, world, log, with_optimizer), world)
        except CheckpointError as error:
            why = error
            log.line(f"note: passing over {name}: {why}")
    if why is not None:
        raise CheckpointError(f"{why}; no older checkpoint in {folder} is whole; give another folder")
    return None


def on_all(read: Callable[[], Checkpoint], world: Axis) -> Checkpoint:
    """The result of `read` on this rank; raises CheckpointError on all ranks if it does so on one."""
    found, wrong = None, None
    try:
        found = read()
    except CheckpointError as error:
        wrong = str(error)
    for why in filter(None, all_gather_object(wrong, world)):
        raise CheckpointError(why)
    assert found is not None
    return found


def open_place(place: Path, with_optimizer: bool = True) -> Checkpoint:
    """The checkpoint in one `iter_` folder, whose tensors are read lazily; raises CheckpointError if it is damaged.

    The files of the optimizer's state are not checked here; `check_files` does that.
    """
    if (place / MODEL).exists():
        return read_whole(place, with_optimizer)
    manifest = read_manifest(place)
    if re.fullmatch("iter_[0-9]{7,}", place.name) and place_of(place.parent, manifest.iteration) != place:
        raise CheckpointError(f"{place} is of iteration {manifest.iteration}; give it the name that it had")
    manifest.check_sizes(place, with_optimizer=False)
    optimizer = manifest.stored(place, "optimizer/") if with_optimizer else None
    return Checkpoint(place, manifest.iteration, manifest.stored(place, "model/"), optimizer or None,
                      read_state(place / STATE), manifest.stored(place, "ema/") or None)


def place_in(path: Path, iteration: int | None = None) -> Path:
    """The folder of a checkpoint: `path` itself if it is one, else that of `iteration` in the run's folder `path`.

    Without an iteration, the one that the run would resume from. Raises CheckpointError if there is none.
    """
    if (path / STATE).is_file():
        return path
    places = in_order(path)[1] if iteration is None else [iterations(path).get(iteration)]
    place = places[0] if places else None
    if place is None:
        what = "checkpoint" if iteration is None else f"iteration {iteration}"
        raise CheckpointError(f"{path} holds no {what}; give the folder of a run, or of one of its checkpoints")
    if not (place / STATE).is_file():
        raise CheckpointError(f"{place} is not of this program: it has no {STATE}; give the format that it is of")
    return place


def read_state(path: Path) -> dict[str, Any]:
    """The content of a state.json; raises CheckpointError if it is missing or damaged."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged or missing ({error})") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: damaged, or not of a run")
    config = state.get("config")
    if isinstance(config, dict) and isinstance(config.get("mask_prob"), float):
        config["mask_prob"] = [config["mask_prob"]]  # one number, before the flag took three
    return state


def written_s(place: Path) -> float:
    """When a checkpoint was written, in seconds since 1970; 0 if that is unknown."""
    try:
        return float(read_state(place / STATE)["written_s"])
    except (CheckpointError, KeyError, TypeError, ValueError):
        with suppress(OSError):
            return (place / STATE).stat().st_mtime
        return 0.0


def point_to(root: Path, iteration: int) -> None:
    """Write the iteration into the pointer, latest_checkpointed_iteration.txt."""
    write_text(root / LATEST, str(iteration))


def set_aside(folder: str, iteration: int) -> list[Path]:
    """Rename the checkpoints after `iteration`, to which the run has gone back, to abandoned-…; returns the new paths.

    Raises CheckpointError if one cannot be renamed.
    """
    moved = []
    try:
        for number, place in iterations(Path(folder)).items():
            if number > iteration:
                copies = (place.with_name(f"abandoned-{copy}-{place.name}") for copy in itertools.count(1))
                moved.append(place.rename(next(path for path in copies if not path.exists())))
    except OSError as error:
        raise CheckpointError(f"{folder}: iteration {number} cannot be renamed ({error.strerror}); it belongs to a "
                              "continuation that was left, move it away") from error
    if moved:
        with suppress(OSError):
            link_best(Path(folder))
    return moved


def remove_left_over(root: Path) -> None:
    """Remove what killed processes left in a run's folder; only the folder's lock holder may call this.

    Of files that others may be writing there (a report, a picture, another's claim), what is not older than ABANDONED_S
    stays.
    """
    for unfinished in left_over(root / "iter_", begins=True):
        shutil.rmtree(unfinished, ignore_errors=True)
    # Also in checkpoints, and for the seeds of a fine-tuning.
    places = (root, *root.glob("iter_*"), *root.glob("seed-*"))
    rests = [*(rest for place in places for rest in remains(place)), *(("", rest) for rest in root.glob(f"{LOCK}-*"))]
    for name, rest in rests:
        with suppress(OSError):
            if _OF_HOLDER.fullmatch(name) or time.time() - rest.stat().st_mtime > ABANDONED_S:
                rest.unlink()


def prune(root: Path, *, keep: int, keep_every: int, retain_optimizer: int, spared: Collection[Path]) -> None:
    """Remove all but the last `keep` checkpoints, and the optimizer's state of all but the last `retain_optimizer`.

    0 keeps all. Nothing is taken from those in `spared`. Checkpoints at multiples of `keep_every`, and the best one,
    are not removed, but may lose their optimizer's state.
    """
    best = (root / BEST).resolve()
    # By time, not by iteration: a run that went back to an older checkpoint writes lower numbers than those it finds.
    by_age = sorted(iterations(root).items(), key=lambda item: (written_s(item[1]), item[0]))
    for number, place in by_age[:-keep] if keep else ():
        if place not in spared and place.resolve() != best and not (keep_every and number % keep_every == 0):
            shutil.rmtree(place, ignore_errors=True)
    for _, place in by_age[:-retain_optimizer] if retain_optimizer else ():
        if place not in spared and place.exists():
            _drop_optimizer(place)


def note_validation(place: Path, loss: float, measured_on: str | None = None) -> list[Path]:
    """Write a checkpoint's validation loss into its validation.json, and update the link `best`.

    `measured_on`: the digest of the data. Returns the checkpoints that cannot be compared, as `link_best` does.
    """
    write_json(place / VALIDATION, {"loss": loss, MEASURED_ON: measured_on})
    return link_best(place.parent)


def link_best(root: Path) -> list[Path]:
    """Point the link `best` at the checkpoint with the lowest validation loss; remove it if none has a loss.

    Only checkpoints that were evaluated on the same data as the newest of them are compared; returns the others.
    """
    found = validations(root)
    is_alike = dict(zip(found, comparable(list(found.values())), strict=True))
    link, new = root / BEST, root / f".{BEST}"
    new.unlink(missing_ok=True)
    if found:
        new.symlink_to(min(filter(is_alike.get, found), key=lambda place: found[place]["loss"]).name)
        new.replace(link)
    else:
        link.unlink(missing_ok=True)
    return [place for place in found if not is_alike[place]]


def in_order(root: Path) -> tuple[str | None, list[Path]]:
    """A note for the log, or None, and the checkpoints of a run in the order in which to try them.

    The pointer's checkpoint and older ones if the pointer is newer than all checkpoints, else all, the newest first;
    the note tells of a pointer that is not obeyed. Raises CheckpointError if the pointer cannot be read.
    """
    places = iterations(root)
    newest_first = sorted(places, key=lambda number: (written_s(places[number]), number), reverse=True)
    if not places:
        return None, []
    pointer, newest = root / LATEST, newest_first[0]
    try:
        text = pointer.read_text(encoding="utf-8", errors="replace").strip()
        pointed_s = pointer.stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        text, pointed_s = "nothing", 0.0
    except OSError as error:
        raise CheckpointError(f"{pointer}: cannot be read ({error.strerror})") from error
    named = int(text) if re.fullmatch("[0-9]{1,18}", text) else None
    if named in places and (named == newest or pointed_s >= written_s(places[newest])):
        return None, [places[named], *(places[number] for number in newest_first if number < named)]
    why = "was written after it" if named in places else "is the newest that is there"
    return f"note: {pointer} names {text[:40]!r}, but iteration {newest} {why}: going by that", [
        places[number] for number in newest_first]


def _is_one(place: Path) -> bool:
    """Whether `place` is a single checkpoint, not the folder of a run."""
    return (place / MODEL).exists() or (place / MANIFEST).exists()


def _opened(place: Path, world: Axis, log: Log, with_optimizer: WithOptimizer) -> Checkpoint:
    """The checkpoint at `place`; the ranks share the check of its files. Raises CheckpointError."""
    if not place.is_dir():
        raise CheckpointError(f"{place} is not there on this host; give a folder that all hosts share")
    if callable(with_optimizer):
        with_optimizer = with_optimizer(read_state(place / STATE))
    checkpoint = open_place(place, with_optimizer)
    check_files(place, log, world, with_optimizer)
    return checkpoint


def _drop_optimizer(place: Path) -> None:
    """Remove the optimizer's state from a checkpoint; the manifest is replaced first, so it is complete at any time."""
    with suppress(CheckpointError, OSError):
        manifest = read_manifest(place)
        weights = manifest.without_optimizer()
        if weights.tensors.keys() == manifest.tensors.keys():
            return
        weights.write(place)
        for name in manifest.files.keys() - weights.files.keys():
            (place / name).unlink(missing_ok=True)
