"""Finds and names the files of a checkpoint of Megatron-LM v2 or ProteinLM.

FOLDER/latest_checkpointed_iteration.txt                   an iteration as decimal text, or `release`
FOLDER/iter_0000100/mp_rank_TT[_PPP]/model_optim_rng.pt    tensor rank TT of pipeline rank PPP, saved by torch.save
FOLDER/release/mp_rank_TT[_PPP]/model_optim_rng.pt         weights only

Any tensor- and pipeline-parallel size, in fp32, fp16 or bf16. Not supported: the state of the distributed optimizer,
beside which the weights are read, and experts.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from megatron.checkpoint.convert.torch_files import has_mark
from megatron.checkpoint.places import LATEST, place_of
from megatron.errors import CheckpointError

FILE = "model_optim_rng.pt"
RELEASE = "release"
_RANK = re.compile(r"mp_rank_([0-9]{2,4})(?:_([0-9]{3,4}))?")
_ITERATION = re.compile(r"iter_([0-9]{7,18})")


@dataclass(frozen=True)
class Place:
    """A checkpoint: its folder, or the file if it has just one, and its files as [pipeline rank][tensor rank]."""

    path: Path
    files: list[list[Path]]


def recognises(path: Path) -> bool:
    """Whether `path` looks like a checkpoint of Megatron v2, or a folder of them; opens no pickle."""
    return has_mark(path, any_file, b"language_model")


def any_file(path: Path) -> Path:
    """A rank's file of the checkpoint that `find_place` finds, or misses parts of; raises CheckpointError without one.
    """
    if path.is_file():
        return path
    place = _folder_in(path, None)
    files = [file for name in (FILE, "*.pt") for file in sorted(place.glob(f"mp_rank_*/{name}"))]
    if not files:
        raise CheckpointError(f"{place} holds no file of a rank; give the folder of a run of Megatron")
    return files[0]


def find_place(path: Path, iteration: int | None = None) -> Place:
    """The checkpoint at `path`: a run's folder, a checkpoint's folder, or a rank's file.

    In a run's folder, the checkpoint of `iteration`, by default the one that Megatron would resume from. Raises
    CheckpointError if there is none or a rank's file is missing.
    """
    if path.is_file():
        siblings = _RANK.fullmatch(path.parent.name) and path.name == FILE
        return _place_in(path.parent.parent) if siblings else Place(path, [[path]])
    return _place_in(_folder_in(path, iteration))


def newest(folder: Path) -> str:
    """The folder name of the checkpoint that the pointer of a run's folder names, else of the last iteration there.

    Raises CheckpointError if there is none.
    """
    there = sorted(part.name for part in folder.iterdir() if _ITERATION.fullmatch(part.name))
    try:
        text = (folder / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        text = ""
    if re.fullmatch("[0-9]{1,18}", text) and (named := place_of(folder, int(text))).is_dir():
        return named.name
    if (folder / RELEASE).is_dir() and (text == RELEASE or not there):
        return RELEASE
    if there:
        return there[-1]
    raise CheckpointError(f"{folder} holds no iter_ folder and no {RELEASE}; give the folder of a run of Megatron")


def place_for(folder: Path, iteration: int) -> Path:
    """The folder of an iteration's checkpoint in a run's folder; `release` for iteration 0, weights without a run."""
    return place_of(folder, iteration) if iteration else folder / RELEASE


def rank_name(tensor: int, pipeline: int, num_pipeline: int) -> str:
    """The name of a rank's folder in a checkpoint's folder."""
    return f"mp_rank_{tensor:02d}" + (f"_{pipeline:03d}" if num_pipeline > 1 else "")


def _folder_in(path: Path, iteration: int | None) -> Path:
    """The folder with the ranks' folders: `path`, or that of `iteration`, or of the newest, in it; else raises
    CheckpointError.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not there; give the folder of a run of Megatron")
    if any(_RANK.match(part.name) for part in path.glob("mp_rank_*")):
        return path
    return path / newest(path) if iteration is None else place_of(path, iteration)


def _place_in(folder: Path) -> Place:
    """The checkpoint in a folder of mp_rank_ folders; raises CheckpointError if a file is missing."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not there; give another iteration")
    found: dict[tuple[int, int], Path] = {}
    for part in sorted(folder.glob("mp_rank_*")):
        match = _RANK.fullmatch(part.name)
        if match is None:
            raise CheckpointError(f"{part}: of ranks that are neither tensor nor pipeline, such as experts', which "
                                  "models here have not")
        found[int(match[2] or 0), int(match[1])] = part / FILE
    num_pipeline, num_tensor = (1 + max(number, default=-1) for number in (
        [pipeline for pipeline, _ in found], [tensor for _, tensor in found]))
    files = [[found.get((pipeline, tensor)) or folder / rank_name(tensor, pipeline, num_pipeline) / FILE
              for tensor in range(num_tensor)] for pipeline in range(num_pipeline)]
    if not files:
        raise CheckpointError(f"{folder} holds no mp_rank_ folder; give the folder of a run of Megatron")
    for file in (file for stage in files for file in stage):
        if not file.is_file():
            _refuse_absence(file)
    return Place(folder, files)


def _refuse_absence(file: Path) -> None:
    """Raises CheckpointError for a rank's missing file, with the likely reason."""
    others = sorted(part.name for part in file.parent.glob("*.pt")) if file.parent.is_dir() else []
    if others:
        raise CheckpointError(f"{file.parent / others[0]} is of Megatron's distributed optimizer or a later form; save "
                              f"it there as {FILE}, without --use-distributed-optimizer")
    raise CheckpointError(f"{file} is missing: a rank's part of the checkpoint; copy it as well")
