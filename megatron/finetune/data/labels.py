"""What stands as a label in a file, as what a model learns: kinds told from labels, class names, errors with places.

Shapes: r residues of a protein, c classes.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np

from megatron.errors import DataError
from megatron.finetune.data.tasks import CLASS, CLASSES, CONTACTS, NUMBER, RESIDUES, Task
from megatron.kernels.packed_sequence import NO_TARGET

SEPARATOR = ";"  # between the classes of one text
_WHOLE = re.compile(r"-?\d+")
_SHOWN = 40
_MASKS: dict[Any, bool] = {"0": False, "1": True, 0: False, 1: True}


@dataclass(frozen=True)
class Record:
    """A protein as a file has it; `place` names file and line or record, `ids` are its residues' in the vocabulary."""

    place: str
    name: str
    ids: np.ndarray  # uint8 [r]
    label: Any = None
    mask: Any = None

    def wrong(self, finding: str) -> DataError:
        """The error that says so of this record."""
        return DataError(f"{self.place}: {finding}")


@dataclass(frozen=True)
class LabelSpace:
    """What labels of a task can be: all that is needed to read more of them, and to name what a model predicts.

    is_fixed: the classes are the task's and not those of a training file; a whole number is then a place among them.
    """

    kind: str
    class_names: tuple[str, ...] = ()
    uncounted: tuple[str, ...] = ()
    is_fixed: bool = False

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "LabelSpace":
        """The one whose `vars` were written as JSON."""
        lists = {name: tuple(fields[name]) for name in ("class_names", "uncounted")}
        return cls(**{**fields, **lists})

    def read(self, record: Record) -> Any:
        """The label of a record; raises DataError where it is missing, or not one of these.

        number: a float. class: its place among the names, an int. classes: bool [c]. residues: int16 [r], NO_TARGET
        where a residue does not count. contacts: coordinates in angstrom, float32 [r, 3], NaN where unresolved.
        """
        return _READ[self.kind](self, record)

    def index(self, record: Record, value: Any) -> int:
        """The place of a class; raises DataError for one that is none of these."""
        name = class_name(record, value)
        if name in self.class_names:
            return self.class_names.index(name)
        if self.is_fixed and name.isdecimal() and int(name) < len(self.class_names):
            return int(name)
        known = ", ".join(self.class_names[:12]) + (", …" if len(self.class_names) > 12 else "")
        owner = "task" if self.is_fixed else "training file"
        raise record.wrong(f"the class {name[:_SHOWN]!r} is none of the {owner}'s ({known})")


def label_space(task: Task, records: Sequence[Record]) -> LabelSpace:
    """The labels of a task by its training records; raises DataError where these do not agree, or leave no choice."""
    kind = task.kind or _kind_of(records)
    if kind in (NUMBER, CONTACTS):
        return LabelSpace(kind)
    if task.class_names is not None:
        return LabelSpace(kind, task.class_names, task.uncounted, is_fixed=True)
    names = _class_names(kind, task.uncounted, records)
    if len(names) < (1 if kind == CLASSES else 2):
        raise records[0].wrong(f"all labels of the training file are of the class {', '.join(names) or '(none)'}; "
                               "there is nothing to learn")
    return LabelSpace(kind, names, task.uncounted)


def class_name(record: Record, value: Any) -> str:
    """A class as text; raises DataError for what names none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (str, int)) and str(value).strip():
        return str(value).strip()
    raise record.wrong(f"{_shown(value)} is no class; expected text or a whole number")


def class_weights(space: LabelSpace, labels: Sequence[Any]) -> np.ndarray:
    """Balanced weights of the classes, float64 [c]: of all labels that count, over classes and over those of a class.

    As scikit-learn's `class_weight="balanced"`; with several classes a protein, proteins without a class over those
    with it (BCEWithLogitsLoss's `pos_weight`). A class without a label gets 0.
    """
    num_classes = len(space.class_names)
    if space.kind == CLASSES:
        counts = np.sum(labels, axis=0)
        return np.where(counts > 0, (len(labels) - counts) / np.maximum(counts, 1), 0.0)
    joined = np.concatenate(labels) if space.kind == RESIDUES else np.asarray(labels)
    counts = np.bincount(joined[joined != NO_TARGET], minlength=num_classes)
    return np.where(counts > 0, counts.sum() / (num_classes * np.maximum(counts, 1)), 0.0)


def _kind_of(records: Sequence[Record]) -> str:
    """The kind that all labels can be of."""
    possible = {CONTACTS, RESIDUES, NUMBER, CLASSES, CLASS}
    has_separators = has_points = False
    for record in records:
        value = _present(record)
        fitting = possible & _kinds(value, len(record.ids))
        if not fitting:
            raise record.wrong(f"the label {_shown(value)} is of another kind than those before it ("
                               f"{', '.join(sorted(possible))}); --label-kind says what the labels are")
        possible = fitting
        has_separators |= not isinstance(value, str) or SEPARATOR in value
        has_points |= isinstance(value, str) and not value.isdecimal()
    if NUMBER in possible and has_points:  # numbers that happen to take as many letters as there are residues
        possible.discard(RESIDUES)
    if not has_separators:
        possible.discard(CLASSES)
    return next(kind for kind in (CONTACTS, RESIDUES, NUMBER, CLASSES, CLASS) if kind in possible)


def _kinds(value: Any, num_residues: int) -> set[str]:
    """What a label alone could be."""
    if isinstance(value, str):
        kinds = {CLASS, CLASSES} | ({RESIDUES} if len(value) == num_residues else set())
        return kinds | ({NUMBER} if _as_number(value) is not None else set())
    if isinstance(value, bool):
        return {CLASS}
    if isinstance(value, (int, float)):
        return {NUMBER, CLASS} if float(value).is_integer() else {NUMBER}
    if not isinstance(value, list):
        return set()
    fits = len(value) == num_residues
    if value and all(item is None or (isinstance(item, list) and len(item) == 3) for item in value):
        return {CONTACTS} if fits else set()
    if len(value) == 1 and isinstance(value[0], float):
        return {NUMBER}
    if not all(item is None or isinstance(item, (str, int)) for item in value):
        return set()
    return {CLASSES} | ({RESIDUES} if fits else set()) | ({NUMBER} if len(value) == 1 and _is_int(value[0]) else set())


def _class_names(kind: str, uncounted: Sequence[str], records: Iterable[Record]) -> tuple[str, ...]:
    """The classes of some records: whole numbers in their order, else in that of their letters."""
    names: set[str] = set()
    for record in records:
        values: Iterable[Any] = [_single(record)] if kind == CLASS else (
            _several(record) if kind == CLASSES else _of_residues(record))
        if kind == RESIDUES:
            values = [value for value in set(compress(values, _counts(record))) if not _is_uncounted(value, uncounted)]
        names.update(class_name(record, value) for value in values)
    return tuple(sorted(names, key=int) if all(map(_WHOLE.fullmatch, names)) else sorted(names))


def _number(space: LabelSpace, record: Record) -> float:
    value = _single(record)
    number = _as_number(value)
    if number is None:
        raise record.wrong(f"the label {_shown(value)} is no number")
    if not np.isfinite(number):
        raise record.wrong(f"the label is {number}; expected a finite number")
    return number


def _class(space: LabelSpace, record: Record) -> int:
    return space.index(record, _single(record))


def _classes(space: LabelSpace, record: Record) -> np.ndarray:
    chosen = np.zeros(len(space.class_names), dtype=bool)
    chosen[[space.index(record, value) for value in _several(record)]] = True
    return chosen


def _residues(space: LabelSpace, record: Record) -> np.ndarray:
    values, counts = _of_residues(record), _counts(record)
    indices = {value: NO_TARGET if _is_uncounted(value, space.uncounted) else space.index(record, value)
               for value in set(compress(values, counts))}
    return np.array([indices[value] if is_counted else NO_TARGET
                     for value, is_counted in zip(values, counts, strict=True)], dtype=np.int16)


def _contacts(space: LabelSpace, record: Record) -> np.ndarray:
    value = record.label if isinstance(record.label, np.ndarray) else _present(record)
    try:
        if not isinstance(value, np.ndarray):
            value = [[np.nan] * 3 if atom is None else atom for atom in value]
        atoms_r3 = np.array(value, dtype=np.float32)
    except (TypeError, ValueError):
        atoms_r3 = np.empty(0, dtype=np.float32)
    if atoms_r3.ndim != 2 or atoms_r3.shape[1] != 3:
        raise record.wrong(f"the label {_shown(value)} is not a place [x, y, z], or null, for each residue")
    _check_length(record, "places", len(atoms_r3))
    if np.isinf(atoms_r3).any():
        raise record.wrong("a place of the label is infinite; null stands for an unresolved residue")
    atoms_r3[np.isnan(atoms_r3).any(axis=1) | ~_counts(record)] = np.nan
    return atoms_r3


_READ: dict[str, Callable[[LabelSpace, Record], Any]] = {
    NUMBER: _number, CLASS: _class, CLASSES: _classes, RESIDUES: _residues, CONTACTS: _contacts}


def _present(record: Record) -> Any:
    """The label in Python's own types; raises DataError where there is none."""
    value = _plain(record.label)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise record.wrong("the label is missing")
    return value


def _single(record: Record) -> Any:
    """A label that is one value; one alone in an array, as TAPE has numbers, is that too."""
    value = _present(record)
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _several(record: Record) -> list[Any]:
    value = _present(record)
    if isinstance(value, str):
        return [part for part in value.split(SEPARATOR) if part.strip()]
    return value if isinstance(value, list) else [value]


def _of_residues(record: Record) -> Sequence[Any]:
    value = _present(record)
    if not isinstance(value, (str, list)):
        raise record.wrong(f"the label {_shown(value)} is neither text nor a list with a class for each residue")
    if isinstance(value, list) and not all(item is None or isinstance(item, (str, int, float)) for item in value):
        raise record.wrong(f"the label {_shown(value)} has no class for some residue; expected text or whole numbers")
    _check_length(record, "classes", len(value))
    return value


def _counts(record: Record) -> np.ndarray:
    """Which residues count, bool [r], by the record's mask; without one all do."""
    mask = _plain(record.mask)
    if mask is None:
        return np.ones(len(record.ids), dtype=bool)
    if not isinstance(mask, (str, list)):
        raise record.wrong(f"the mask {_shown(mask)} is neither text nor a list with 0 or 1 for each residue")
    if len(mask) != len(record.ids):
        raise record.wrong(f"{len(record.ids)} residues, but a mask of {len(mask)}")
    bad = [value for value in mask if not isinstance(value, (str, int, float)) or value not in _MASKS]
    if bad:
        raise record.wrong(f"the mask has {_shown(bad[0])}; expected 0 or 1 for each residue")
    return np.array([_MASKS[value] for value in mask])


def _check_length(record: Record, things: str, number: int) -> None:
    if number != len(record.ids):
        raise record.wrong(f"{len(record.ids)} residues, but {number} {things} in the label")


def _is_uncounted(value: Any, uncounted: Sequence[str]) -> bool:
    return value is None or value == -1 or value in uncounted


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or "_" in str(value):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
