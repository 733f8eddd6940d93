"""Save a run, and load it again.

FOLDER/latest_checkpointed_iteration.txt     the decimal number of the newest whole checkpoint
FOLDER/iter_0000100/model.safetensors        every parameter, fp32, by name
FOLDER/iter_0000100/optimizer.safetensors    every state tensor, as KIND/PARAMETER (absent with --no-save-optim)
FOLDER/iter_0000100/state.json               progress, loss scale, the flags of the run, the layout's version

Nothing here is a pickle: opening a checkpoint runs no code.
"""

import itertools
import json
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron.errors import CheckpointError
from megatron.files import new_folder, write_json, write_text
from megatron.parallel.placement import placement_of

VERSION = 1
LATEST = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint holds: every tensor whole, and on the CPU.

    `optimizer` is None where it was not saved or not asked for.
    """

    iteration: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor] | None
    state: dict[str, Any]


def save(folder: str, checkpoint: Checkpoint, keep: int = 0, loaded: int | None = None) -> Path:
    """Write `checkpoint` below `folder` and point to it, whole or not at all; returns its path.

    With `keep` > 0 only the so many written last stay, and iteration `loaded`, from which this run went on. Raises
    CheckpointError where the disk refuses.
    """
    root = Path(folder)
    target = _place(root, checkpoint.iteration)
    try:
        with new_folder(target) as place:
            save_file(_plain(checkpoint.model), place / "model.safetensors")
            if checkpoint.optimizer is not None:
                save_file(_plain(checkpoint.optimizer), place / "optimizer.safetensors")
            content = {"version": VERSION, "iteration": checkpoint.iteration, **checkpoint.state}
            write_json(place / "state.json", content)
        write_text(root / LATEST, str(checkpoint.iteration))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not save {target}: {error}; the last good checkpoint is untouched, make room or "
                              "give another --save") from error
    if keep:
        spared = {target, *([] if loaded is None else [_place(root, loaded)])}
        # By time, not by number: a run that went back to an older iteration saves lower numbers than it finds.
        for old in sorted(_iterations(root).values(), key=_written)[:-keep]:
            if old not in spared:
                shutil.rmtree(old, ignore_errors=True)
    return target


def set_aside(folder: str, iteration: int) -> list[Path]:
    """Rename the checkpoints after `iteration`, of a course that was left by going back; returns their new paths."""
    moved = []
    try:
        for number, place in _iterations(Path(folder)).items():
            if number > iteration:
                copies = (place.with_name(f"abandoned-{copy}-{place.name}") for copy in itertools.count(1))
                moved.append(place.rename(next(path for path in copies if not path.exists())))
    except OSError as error:
        raise CheckpointError(f"{folder}: iteration {number} cannot be renamed ({error.strerror}); it belongs to a "
                              "course that was left, move it away") from error
    return moved


def load(folder: str, with_optimizer: bool = True) -> Checkpoint | None:
    """The checkpoint that `folder` points to, or None where it holds none; raises CheckpointError.

    Checkpoints without a pointer, and a checkpoint in the place of their folder, are not passed over.
    """
    pointer = Path(folder) / LATEST
    try:
        text = pointer.read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        _check_absence(Path(folder))
        return None
    except OSError as error:
        raise CheckpointError(f"{pointer}: cannot be read ({error.strerror})") from error
    if not re.fullmatch("[0-9]{1,18}", text):
        raise CheckpointError(f"{pointer}: found {text[:40]!r}, expected an iteration number; write the number of the "
                              "iter_ folder to load into it")
    place = _place(Path(folder), int(text))
    if not place.is_dir():
        raise CheckpointError(f"{pointer} names iteration {text}, but {place} is not there; write the number of an "
                              "iter_ folder that is")
    state = _read_state(place / "state.json")
    optimizer = place / "optimizer.safetensors"
    return Checkpoint(iteration=int(text), model=_Tensors(place / "model.safetensors"), state=state,
                      optimizer=_Tensors(optimizer) if with_optimizer and optimizer.exists() else None)


def load_model(stages: Iterable[torch.nn.Module], tensors: Mapping[str, Tensor], source: str,
               names: Collection[str]) -> None:
    """Copy whole `tensors`, or this rank's part of them, into the parameters of the same names.

    `names`: those of the whole model's parameters, of which this rank's stages have some. Raises CheckpointError naming
    what does not fit.
    """
    for name in sorted(set(names) ^ tensors.keys()):
        where = "the model" if name in tensors else source
        raise CheckpointError(f"{source}: parameter {name} is not in {where}; give the model flags of that checkpoint")
    for name, parameter in (named for stage in stages for named in stage.named_parameters()):
        with torch.no_grad():
            parameter.copy_(_part(tensors, name, parameter, source))


def optimizer_parts(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """This rank's parts of an optimizer's state, KIND/PARAMETER; that of other ranks' parameters stays unread.

    Raises CheckpointError where it does not fit `parameters`, those of this rank.
    """
    kinds_of: dict[str, set[str]] = {}
    for key in tensors:
        kind, _, name = key.partition("/")
        kinds_of.setdefault(name, set()).add(kind)
    for name, kinds in sorted(kinds_of.items()):
        if missing := set().union(*kinds_of.values()) - kinds:
            raise CheckpointError(f"{source}: the optimizer's state lacks {min(missing)}/{name}; load an older "
                                  "iteration, or give --no-load-optim to start the optimizer afresh")
    named = ((key, parameters.get(key.partition("/")[2])) for key in tensors)
    return {key: _part(tensors, key, parameter, source) for key, parameter in named if parameter is not None}


def _part(tensors: Mapping[str, Tensor], name: str, parameter: Tensor, source: str) -> Tensor:
    """This rank's part of a whole tensor that lies as `parameter` does; a scalar has no parts."""
    placement, whole = placement_of(parameter), tensors[name]
    expected = placement.whole_shape(parameter)
    if whole.ndim and whole.shape != expected:
        raise CheckpointError(f"{source}: {name} is {list(whole.shape)} there and {list(expected)} here; give the "
                              "model flags of that checkpoint")
    return placement.cut(whole, parameter)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        version = state["version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint state ({error}); load an older iteration") from error
    if version != VERSION:
        raise CheckpointError(f"{path}: version {version}, this program reads {VERSION}; load it with the program that "
                              "wrote it")
    return state


class _Tensors(Mapping[str, Tensor]):
    """The tensors of a file, each read from the disk when it is asked for: a rank asks for its own alone."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = _opened(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: damaged or missing ({error}); load an older iteration") from error
        self._names = dict.fromkeys(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _opened(path: Path) -> safe_open:
    """safe_open, which takes no path that is not UTF-8, of any path: such a file goes by the number that it is open as.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with path.open("rb") as file:
            return safe_open(f"/proc/self/fd/{file.fileno()}", framework="pt")
    return safe_open(path, framework="pt")


def _place(root: Path, iteration: int) -> Path:
    return root / f"iter_{iteration:07d}"


def _iterations(root: Path) -> dict[int, Path]:
    """The folders of checkpoints below `root` by their numbers, ascending."""
    places = {int(place.name[5:]): place for place in root.glob("iter_*") if re.fullmatch("[0-9]{7,}", place.name[5:])}
    return dict(sorted(places.items()))


def _written(place: Path) -> tuple[int, Path]:
    """A key that sorts checkpoints by when they were written; state.json is the last file of each."""
    try:
        return (place / "state.json").stat().st_mtime_ns, place
    except OSError:
        return 0, place


def _check_absence(folder: Path) -> None:
    """Raises CheckpointError where a folder without a pointer holds checkpoints, or is one."""
    if (folder / "model.safetensors").exists():
        raise CheckpointError(f"{folder} is one checkpoint, not the folder of a run; give {folder.resolve().parent}, "
                              f"whose {LATEST} says which iteration to load")
    numbers = list(_iterations(folder))
    if numbers:
        raise CheckpointError(f"{folder} holds {_place(folder, numbers[-1]).name} but no {LATEST}; write the number of "
                              f"the iter_ folder to load into it: echo {numbers[-1]} > {folder / LATEST}")
