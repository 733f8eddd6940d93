"""Interprets labels: collects class names, and reads each label as what the model learns.

Errors name the place in the file. Shapes: r residues of a protein, c classes.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from typing import Any

import numpy as np

from megatron.errors import DataError
from megatron.finetune.data.contacts import read_contacts
from megatron.finetune.data.kinds import SEPARATOR, kind_of, length_of, no_number
from megatron.finetune.data.record import ProteinRecord, as_number, is_missing, shown, shown_names
from megatron.finetune.data.tasks import CLASS, CLASSES, CONTACTS, NUMBER, NUMBERS, RESIDUES, WITHOUT_CLASSES, Task
from megatron.kernels.packed_sequence import NO_TARGET

_FEW = 20  # proteins that may all be of classes of their own
_WHOLE = re.compile(r"-?\d+")


@dataclass(frozen=True)
class LabelSpace:
    """The possible labels of a task: what is needed to read further labels and to name predictions.

    is_fixed: the task defines the classes, not a training file; a whole number as a label is then an index into them.
    pairs_from: the number of the first residue, if contacts are lists of pairs.
    """

    kind: str
    class_names: tuple[str, ...] = ()
    uncounted: tuple[str, ...] = ()
    is_fixed: bool = False
    pairs_from: int | None = None

    def read(self, record: ProteinRecord) -> Any:
        """The label of a record; raises DataError if it is missing or does not belong to this space.

        number: a float. class: the index of the class, an int. classes: bool [c]. residues: int16 [r], NO_TARGET for
        residues that do not count. numbers: float32 [r], NaN for residues that do not count. contacts: a table, see the
        module `contacts`.
        """
        return _READ[self.kind](self, record)

    def index(self, record: ProteinRecord, value: Any) -> int:
        """The index of a class; raises DataError for a class that is not in this space."""
        name = class_name(record, value)
        if name in self._places:
            return self._places[name]
        if self.is_fixed and name.isdecimal() and int(name) < len(self.class_names):
            return int(name)
        if is_missing(name):
            raise record.missing(f"{shown(name)} stands for none")
        owner = "task" if self.is_fixed else "training file"
        raise record.wrong(f"the class {shown(name)} is none of the {owner}'s ({shown_names(self.class_names)})")

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.class_names)}


def label_space(task: Task, records: Sequence[ProteinRecord], skips: bool = False) -> LabelSpace:
    """The space of the labels of some training records; raises DataError if they disagree or there is nothing to learn.

    `skips`: leave out of account labels that are missing, unlike most or cannot be read.
    """
    if skips:
        records = [record for record in records if record.has_label(task.kind is None)]
    kind = task.kind or (kind_of(records, skips) if records else CLASS)
    if kind in WITHOUT_CLASSES:
        return LabelSpace(kind, pairs_from=task.pairs_from)
    if task.class_names is not None:
        return LabelSpace(kind, task.class_names, task.uncounted, is_fixed=True)
    names = _class_names(kind, task.uncounted, records, skips)
    if not records:
        return LabelSpace(kind)
    if len(names) < (1 if kind == CLASSES else 2):
        raise records[0].wrong(f"all labels of the training file are of the class {shown_names(names) or '(none)'}; "
                               "there is nothing to learn")
    if task.kind is None and kind == CLASS and 2 * len(names) > len(records) > _FEW:
        raise records[0].wrong(f"{len(records):,} labels of the training file are {len(names):,} different texts "
                               f"({shown_names(names)}), too many for classes; this one {length_of(records[0])}. "
                               "--label-kind says what the labels are")
    return LabelSpace(kind, names, task.uncounted)


def class_name(record: ProteinRecord, value: Any) -> str:
    """The name of a class as text; raises DataError for a value that cannot be a class."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (str, int)) and str(value).strip():
        return str(value).strip()
    raise record.wrong(f"{shown(value)} is no class; expected text or a whole number")


def class_weights(space: LabelSpace, labels: Sequence[Any]) -> np.ndarray:
    """Balanced weights of the classes, float64 [c]: the number of labels that count, divided by the number of classes
    and by the number of labels of the class.

    This is scikit-learn's `class_weight="balanced"`. With several classes per protein: the proteins without the class
    divided by those with it (`pos_weight` of BCEWithLogitsLoss). A class without labels has weight 0.
    """
    counts = class_counts(space, labels)
    if space.kind == CLASSES:
        return np.where(counts > 0, (len(labels) - counts) / np.maximum(counts, 1), 0.0)
    return np.where(counts > 0, counts.sum() / (len(counts) * np.maximum(counts, 1)), 0.0)


def class_counts(space: LabelSpace, labels: Sequence[Any]) -> np.ndarray:
    """How many labels are of each class, int64 [c]: proteins or, for the kind residues, residues that count."""
    if space.kind == CLASSES:
        return np.asarray(labels, dtype=np.int64).sum(axis=0)
    joined = np.concatenate(labels) if space.kind == RESIDUES else np.asarray(labels)
    return np.bincount(joined[joined != NO_TARGET], minlength=len(space.class_names))


def _class_names(kind: str, uncounted: Sequence[str], records: Iterable[ProteinRecord],
                 skips: bool) -> tuple[str, ...]:
    """The names of all classes in some records: in numeric order if all are whole numbers, else sorted as text.

    `skips`: pass over records that cannot be read, instead of raising DataError.
    """
    names: set[str] = set()
    for record in records:
        with suppress(DataError) if skips else nullcontext():
            names |= _names_in(kind, uncounted, record)
    return tuple(sorted(names, key=int) if all(map(_WHOLE.fullmatch, names)) else sorted(names))


def _names_in(kind: str, uncounted: Sequence[str], record: ProteinRecord) -> set[str]:
    """The names of the classes in one record; raises DataError."""
    values: Iterable[Any] = [_single(record)] if kind == CLASS else (
        _several(record) if kind == CLASSES else _of_residues(record))
    if kind == RESIDUES:
        values = [value for value in set(compress(values, record.counts())) if not _is_uncounted(value, uncounted)]
    return {class_name(record, value) for value in values}


def _number(space: LabelSpace, record: ProteinRecord) -> float:
    value = _single(record)
    number = as_number(value)
    if is_missing(value):
        raise record.missing(f"{shown(value)} stands for none")
    if number is None:
        raise no_number(record)
    if not np.isfinite(number):
        raise record.wrong(f"the label is {number}; expected a finite number")
    return number


def _classes(space: LabelSpace, record: ProteinRecord) -> np.ndarray:
    chosen = np.zeros(len(space.class_names), dtype=bool)
    chosen[[space.index(record, value) for value in _several(record)]] = True
    return chosen


def _residues(space: LabelSpace, record: ProteinRecord) -> np.ndarray:
    values, counts = _of_residues(record), record.counts()
    indices = {value: NO_TARGET if _is_uncounted(value, space.uncounted) else space.index(record, value)
               for value in set(compress(values, counts))}
    return np.array([indices[value] if is_counted else NO_TARGET
                     for value, is_counted in zip(values, counts, strict=True)], dtype=np.int16)


def _numbers(space: LabelSpace, record: ProteinRecord) -> np.ndarray:
    value = record.present()
    values = value.split(SEPARATOR) if isinstance(value, str) else value
    if not isinstance(values, list):
        raise record.wrong(f"the label {shown(value)} is no list with a number, or null, for each residue")
    record.check_length("numbers", len(values))
    numbers_r = np.full(len(values), np.nan, dtype=np.float32)
    for place in np.flatnonzero(record.counts()):
        number = None if values[place] in (None, "") else as_number(values[place])
        if values[place] not in (None, "") and (number is None or np.isinf(number)):
            raise record.wrong(f"the label has {shown(values[place])} for residue {place + 1}; expected a number, or "
                               "null where none is known")
        numbers_r[place] = np.nan if number is None else number
    return numbers_r


_READ: dict[str, Callable[[LabelSpace, ProteinRecord], Any]] = {
    NUMBER: _number, CLASSES: _classes, RESIDUES: _residues, NUMBERS: _numbers,
    CLASS: lambda space, record: space.index(record, _single(record)),
    CONTACTS: lambda space, record: read_contacts(record, space.pairs_from)}


def _single(record: ProteinRecord) -> Any:
    """A label that is a single value; an array of one value, as TAPE stores numbers, counts as one."""
    value = record.present()
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _several(record: ProteinRecord) -> list[Any]:
    value = record.present(of_several=True)
    if isinstance(value, str):
        return [part for part in value.split(SEPARATOR) if part.strip()]
    return value if isinstance(value, list) else [value]


def _of_residues(record: ProteinRecord) -> Sequence[Any]:
    value = record.present()
    if not isinstance(value, (str, list)):
        raise record.wrong(f"the label {shown(value)} is neither text nor a list with a class for each residue")
    if isinstance(value, list) and not all(item is None or isinstance(item, (str, int, float)) for item in value):
        raise record.wrong(f"the label {shown(value)} has no class for some residue; expected text or whole numbers")
    record.check_length("classes", len(value))
    return value


def _is_uncounted(value: Any, uncounted: Sequence[str]) -> bool:
    return value is None or value == -1 or value in uncounted
