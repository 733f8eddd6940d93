"""Results on disk, one folder per part, each complete or absent: a killed run continues after its last complete part.

A part has one array per output: [proteins, …] for outputs of whole proteins, [residues, …] for outputs of residues (all
proteins concatenated), [pairs] for contacts.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron.errors import OutputError
from megatron.files import new_folder, write_json
from megatron.infer.answers import Answer, Asked

IDENTITY = "asked.json"
_BEGINNING = b'{\n "identity":'  # of what `write_json` makes
_OF_RESIDUES = {"per_tok": 1, "logits": 0}  # the axis of residues


class Parts:
    """The parts of one job, in `folder`, which also records the job's identity: its settings and input.

    Raises OutputError if the folder holds parts of another job.
    """

    def __init__(self, folder: Path, ranges: Sequence[range], lengths_u: np.ndarray, asked: Asked) -> None:
        self.folder, self.ranges, self._asked = folder, ranges, asked
        self._lengths_u = lengths_u
        self._starts = np.array([part.start for part in ranges])
        self._residues_before = np.append(0, np.cumsum(lengths_u, dtype=np.int64))
        self._pairs_before = np.append(0, np.cumsum(lengths_u.astype(np.int64) ** 2))
        self._open: tuple[int, dict[str, np.ndarray]] | None = None

    def begin(self, identity: Any) -> None:
        """Create the folder, or check that its parts belong to the same job."""
        file = self.folder / IDENTITY
        self.folder.mkdir(parents=True, exist_ok=True)
        if not any(self.folder.iterdir()):
            write_json(file, {"identity": identity})
        elif not is_of(file, identity):
            raise OutputError(f"{self.folder} holds parts of other work (another input, checkpoint, kind of device "
                              "or flags); remove it, or choose another output")

    def is_done(self, number: int) -> bool:
        """Whether that part is complete."""
        return self._place(number).exists()

    def write(self, number: int, answers: Sequence[Answer], dtype: np.dtype) -> None:
        """Write the results for the proteins of a part, given in order."""
        with new_folder(self._place(number)) as folder:
            for name in self._asked.include:
                values = [answer[name] for answer in answers]
                if name in _OF_RESIDUES:
                    stacked = np.concatenate([np.moveaxis(each, _OF_RESIDUES[name], 0) for each in values])
                else:
                    stacked = np.concatenate([each.ravel() for each in values]) if name == "contacts" else (
                        np.stack(values))
                _write(folder / f"{name}.npy", stacked.astype(dtype, order="C"))

    def read(self, distinct: int) -> Answer:
        """The results for a protein, given its index among the distinct ones; memory-mapped, not read into memory."""
        number = int(np.searchsorted(self._starts, distinct, side="right")) - 1
        if self._open is None or self._open[0] != number:
            place = self._place(number)
            self._open = number, {name: np.load(place / f"{name}.npy", mmap_mode="r") for name in self._asked.include}
        first, length = self.ranges[number].start, int(self._lengths_u[distinct])
        answer: Answer = {}
        for name, values in self._open[1].items():
            if name in _OF_RESIDUES:
                start = int(self._residues_before[distinct] - self._residues_before[first])
                answer[name] = np.moveaxis(values[start:start + length], 0, _OF_RESIDUES[name])
            elif name == "contacts":
                start = int(self._pairs_before[distinct] - self._pairs_before[first])
                answer[name] = values[start:start + length**2].reshape(length, length)
            else:
                answer[name] = values[distinct - first]
        return answer

    def _place(self, number: int) -> Path:
        return self.folder / f"{number:07d}"


def _write(file: Path, values: np.ndarray) -> None:
    """As numpy.save, whose error for a full disk does not say that the disk is full."""
    with file.open("wb") as opened:
        np.lib.format.write_array_header_1_0(opened, np.lib.format.header_data_from_array_1_0(values))
        opened.write(values.data)


def is_of(file: Path, identity: Any) -> bool:
    """Whether a JSON file records this identity."""
    try:
        return json.loads(file.read_text())["identity"] == json.loads(json.dumps(identity))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def tells_identity(file: Path) -> bool:
    """Whether a file begins like those that `is_of` reads."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(len(_BEGINNING)) == _BEGINNING
