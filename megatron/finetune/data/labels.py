"""Interprets labels: detects their kind, collects class names, and reads each label as what the model learns.

Errors name the place in the file. Shapes: r residues of a protein, c classes.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from typing import Any

import numpy as np

from megatron.finetune.data.contacts import read_contacts
from megatron.finetune.data.record import ProteinRecord, as_number, shown, shown_names
from megatron.finetune.data.tasks import CLASS, CLASSES, CONTACTS, NUMBER, NUMBERS, RESIDUES, WITHOUT_CLASSES, Task
from megatron.kernels.packed_sequence import NO_TARGET

SEPARATOR = ";"  # between the classes, or numbers, of one text
_OF_RESIDUES = {RESIDUES, NUMBERS}
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
        owner = "task" if self.is_fixed else "training file"
        raise record.wrong(f"the class {shown(name)} is none of the {owner}'s ({shown_names(self.class_names)})")

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.class_names)}


def label_space(task: Task, records: Sequence[ProteinRecord]) -> LabelSpace:
    """The space of the labels of some training records; raises DataError if they disagree or there is nothing to learn.
    """
    kind = task.kind or _kind_of(records)
    if kind in WITHOUT_CLASSES:
        return LabelSpace(kind, pairs_from=task.pairs_from)
    if task.class_names is not None:
        return LabelSpace(kind, task.class_names, task.uncounted, is_fixed=True)
    names = _class_names(kind, task.uncounted, records)
    if len(names) < (1 if kind == CLASSES else 2):
        raise records[0].wrong(f"all labels of the training file are of the class {shown_names(names) or '(none)'}; "
                               "there is nothing to learn")
    if task.kind is None and kind == CLASS and 2 * len(names) > len(records) > _FEW:
        raise records[0].wrong(f"{len(records):,} labels of the training file are {len(names):,} different texts "
                               f"({shown_names(names)}), too many for classes; this one {_length(records[0])}. "
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
    num_classes = len(space.class_names)
    if space.kind == CLASSES:
        counts = np.sum(labels, axis=0)
        return np.where(counts > 0, (len(labels) - counts) / np.maximum(counts, 1), 0.0)
    joined = np.concatenate(labels) if space.kind == RESIDUES else np.asarray(labels)
    counts = np.bincount(joined[joined != NO_TARGET], minlength=num_classes)
    return np.where(counts > 0, counts.sum() / (num_classes * np.maximum(counts, 1)), 0.0)


def _kind_of(records: Sequence[ProteinRecord]) -> str:
    """The kind that fits all labels.

    Raises DataError if there is none, or if most labels have an item for each residue and some do not.
    """
    order = (CONTACTS, RESIDUES, NUMBERS, NUMBER, CLASSES, CLASS)
    possible = {*order}
    has_separators = has_points = False
    odd = []  # those whose labels do not have something for each residue
    for record in records:
        value = record.present()
        kinds = _kinds(value, len(record.ids))
        if not possible & kinds:
            length = f" and {_length(record)}" if possible & {*_OF_RESIDUES, CONTACTS} else ""
            raise record.wrong(f"the label {shown(value)} is of another kind than those before it ("
                               f"{', '.join(sorted(possible))}){length}; --label-kind says what the labels are")
        possible &= kinds
        odd += [] if kinds & _OF_RESIDUES else [record]
        has_separators |= not isinstance(value, str) or SEPARATOR in value
        has_points |= isinstance(value, str) and not value.isdecimal()
    if NUMBER in possible and has_points:  # numbers that happen to take as many letters as there are residues
        possible.discard(RESIDUES)
    if not has_separators:
        possible.discard(CLASSES)
    kind = next(kind for kind in order if kind in possible)
    if 0 < 2 * len(odd) < len(records) and kind not in _OF_RESIDUES and not (kind == NUMBER and has_points):
        others = f" (so in {len(odd):,} records)" if len(odd) > 1 else ""
        raise odd[0].wrong(f"the label {_length(odd[0])}{others}, while {len(records) - len(odd):,} of the labels are "
                           f"as long as their sequences; mend it, or give --label-kind {kind} if that is the kind")
    return kind


def _length(record: ProteinRecord) -> str:
    """How many items a label has and how many residues, for a message."""
    value = record.present()
    if not isinstance(value, (str, list)):
        return f"is one value for {record.residues_for(1)}"
    is_letters = isinstance(value, str) and SEPARATOR not in value
    number = len(value if is_letters or isinstance(value, list) else value.split(SEPARATOR))
    return f"has {number:,} {'letters' if is_letters else 'items'} for {record.residues_for(number)}"


def _kinds(value: Any, num_residues: int) -> set[str]:
    """The kinds that a label could be of, judged by its value alone."""
    if isinstance(value, str):
        parts = value.split(SEPARATOR)
        could_be = {NUMBER: as_number(value) is not None, CLASS: True, CLASSES: True,
                    RESIDUES: len(value) == num_residues,
                    NUMBERS: len(parts) > 1 and _are_numbers(parts, num_residues)}
    elif isinstance(value, list):
        are_names = all(item is None or isinstance(item, (str, int)) for item in value)
        widths = {len(item) if isinstance(item, list) else None if item is None else 0 for item in value}
        could_be = {NUMBER: len(value) == 1 and _is_number(value[0]), CLASSES: are_names,
                    RESIDUES: are_names and len(value) == num_residues, NUMBERS: _are_numbers(value, num_residues),
                    # Pairs of residues, or coordinates of each, null where they are unknown.
                    CONTACTS: widths == {2} or (len(value) in (0, num_residues) and widths <= {3, None})}
    else:
        could_be = {NUMBER: _is_number(value),
                    CLASS: isinstance(value, (int, float)) and float(value).is_integer()}
    return {kind for kind, could in could_be.items() if could}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _are_numbers(values: Sequence[Any], num_residues: int) -> bool:
    """Whether `values` are as many as the residues, and each is a number or missing."""
    return len(values) == num_residues and all(
        value is None or value == "" or as_number(value) is not None for value in values)


def _class_names(kind: str, uncounted: Sequence[str], records: Iterable[ProteinRecord]) -> tuple[str, ...]:
    """The names of all classes in some records: in numeric order if all are whole numbers, else sorted as text."""
    names: set[str] = set()
    for record in records:
        values: Iterable[Any] = [_single(record)] if kind == CLASS else (
            _several(record) if kind == CLASSES else _of_residues(record))
        if kind == RESIDUES:
            values = [value for value in set(compress(values, record.counts())) if not _is_uncounted(value, uncounted)]
        names.update(class_name(record, value) for value in values)
    return tuple(sorted(names, key=int) if all(map(_WHOLE.fullmatch, names)) else sorted(names))


def _number(space: LabelSpace, record: ProteinRecord) -> float:
    value = _single(record)
    number = as_number(value)
    if number is None:
        raise record.wrong(f"the label {shown(value)} is no number")
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
    value = record.present()
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
