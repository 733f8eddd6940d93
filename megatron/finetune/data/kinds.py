"""Infers the kind of a training file's labels from their values; errors name the place in the file."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from megatron.errors import DataError
from megatron.finetune.data.record import BY_SKIPPING, ProteinRecord, as_number, is_missing, shown
from megatron.finetune.data.tasks import CLASS, CLASSES, CONTACTS, NUMBER, NUMBERS, RESIDUES

SEPARATOR = ";"  # between the classes, or numbers, of one text
_OF_RESIDUES = {RESIDUES, NUMBERS}
_FEW_CLASSES = 10
_COMMA = re.compile(r"[+-]?\d*(,\d+)+(\.\d+)?([eE][+-]?\d+)?")
_ALMOST = re.compile(rf"[<>≤≥~]?=?\s*({_COMMA.pattern}|[+-]?\d*\.?\d+([eE][+-]?\d+)?)\s*%?")


def kind_of(records: Sequence[ProteinRecord], skips: bool = False) -> str:
    """The kind that fits all labels or, with `skips`, most of them.

    Raises DataError if there is none or a label is missing. Without `skips` also if most labels have an item for each
    residue and some do not, or if most are numbers and some are not.
    """
    order = (CONTACTS, RESIDUES, NUMBERS, NUMBER, CLASSES, CLASS)
    possible = {*order}
    has_separators = has_points = False
    odd, no_numbers = [], []  # those without an item for each residue, and those that are not numbers
    for record in records:
        value = record.present(of_several=CLASSES in possible and NUMBER not in possible)
        if is_missing(value):
            raise record.missing(f"{shown(value)} stands for none; --label-kind class if it is a class")
        kinds = _kinds(value, len(record.ids))
        if not possible & kinds:
            raise _of_another_kind(record, possible)
        possible &= kinds
        odd += [] if kinds & _OF_RESIDUES else [record]
        no_numbers += [] if NUMBER in kinds else [record]
        has_separators |= not isinstance(value, str) or SEPARATOR in value
        has_points |= isinstance(value, str) and not value.isdecimal()
    if NUMBER in possible and has_points:  # numbers that happen to take as many letters as there are residues
        possible.discard(RESIDUES)
    if not has_separators:
        possible.discard(CLASSES)
    kind = next(kind for kind in order if kind in possible)
    if 0 < 2 * len(odd) < len(records) and kind not in _OF_RESIDUES and not (kind == NUMBER and has_points):
        if skips:
            return kind_of(_without(odd, records))
        raise _of_other_length(odd, len(records), kind)
    if kind == CLASS and no_numbers and _are_meant_as_numbers(no_numbers, len(records)):
        if skips:
            return NUMBER
        num_numbers = len(records) - len(no_numbers)
        raise no_number(no_numbers[0], f", while {num_numbers:,} of {len(records):,} labels are" if num_numbers else "",
                        f"; --label-kind {CLASS} if they are classes")
    return kind


def no_number(record: ProteinRecord, others: str = "", otherwise: str = "") -> DataError:
    """An error about a label that is not a number, with the remedy and, in their places, two texts of the caller's."""
    value = record.present()
    remedy = ("write a decimal point, and no other comma" if isinstance(value, str) and _COMMA.fullmatch(value.strip())
              else f"give a number, or leave the record out{BY_SKIPPING}")
    return record.wrong(f"the label {shown(value)} is no number{others}; {remedy}{otherwise}")


def hint_of_classes(labels: Iterable[Any]) -> str | None:
    """Why labels that are read as numbers may be classes: a few whole numbers, or one number in two spellings, such as
    1.1 and 1.10; None if nothing speaks for it.
    """
    spellings: dict[float, str] = {}
    for value in labels:
        number = as_number(value)
        if number is None or is_missing(value):
            continue
        before, text = spellings.setdefault(number, str(value).strip()), str(value).strip()
        if before != text and "." in before and "." in text:
            return f"the labels {before} and {text} are read as the same number"
    if not spellings or len(spellings) > _FEW_CLASSES or not all(number.is_integer() for number in spellings):
        return None
    return f"the labels are read as numbers, and there are only {len(spellings):,} different ones, all whole"


def _of_another_kind(record: ProteinRecord, possible: set[str]) -> DataError:
    length = f" and {length_of(record)}" if possible & {*_OF_RESIDUES, CONTACTS} else ""
    return record.wrong(f"the label {shown(record.present())} is of another kind than those before it ("
                        f"{', '.join(sorted(possible))}){length}; --label-kind says what the labels are")


def _of_other_length(odd: Sequence[ProteinRecord], num_records: int, kind: str) -> DataError:
    others = f" (so in {len(odd):,} records)" if len(odd) > 1 else ""
    return odd[0].wrong(f"the label {length_of(odd[0])}{others}, while {num_records - len(odd):,} of the labels are as "
                        f"long as their sequences; mend it, or give --label-kind {kind} if that is the kind")


def _are_meant_as_numbers(no_numbers: Sequence[ProteinRecord], num_records: int) -> bool:
    """Whether more than half of all labels are numbers, or texts that differ from one in the spelling alone."""
    return 2 * sum(not _is_almost_number(record.present()) for record in no_numbers) < num_records


def _without(left_out: Sequence[ProteinRecord], records: Sequence[ProteinRecord]) -> list[ProteinRecord]:
    places = {record.place for record in left_out}
    return [record for record in records if record.place not in places]


def _is_almost_number(value: Any) -> bool:
    """Whether a text is a number in a spelling that is not read as one: `0,13`, `<0.1`, `12%`."""
    return isinstance(value, str) and _ALMOST.fullmatch(value.strip()) is not None


def length_of(record: ProteinRecord) -> str:
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
