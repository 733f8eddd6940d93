"""Reads the labelled proteins of a task into memory: residues as ids, labels in the form that the model learns."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron.data.corpus.tokenizer import GAPS, ResidueTokenizer
from megatron.data.sources.block import DEFAULT_NAME_KEY, BadRecord, type_name
from megatron.data.sources.source import Source, records_of
from megatron.errors import DataError
from megatron.finetune.data.kinds import hint_of_classes
from megatron.finetune.data.labels import LabelSpace, label_space
from megatron.finetune.data.record import ProteinRecord, plain
from megatron.finetune.data.tasks import NUMBER, SEQUENCE_KEYS, WITHOUT_CLASSES, Task, present_key
from megatron.infer.skipped import REMEDY, Skipped
from megatron.log import Log


@dataclass(frozen=True)
class Example:
    """A protein and its label, as `LabelSpace.read` returns it; None for a protein without a label."""

    name: str
    ids: np.ndarray  # uint8 [residues]
    label: Any = None


@dataclass(frozen=True)
class TaskData:
    """The examples of each part of a task (`train`, and others by name), and the space of its labels."""

    task: Task
    space: LabelSpace
    parts: dict[str, list[Example]]

    def digest(self) -> str:
        """A digest that changes if proteins or labels do."""
        digest = hashlib.blake2b(digest_size=12)
        for part, examples in self.parts.items():
            digest.update(part.encode())
            for example in examples:
                digest.update(example.ids.tobytes() + _bytes_of(example.label) + b"\n")
        return digest.hexdigest()

    def contradictions(self) -> tuple[int, int]:
        """How many sequences of the training part occur with different labels, and how many proteins have these."""
        labels, count = defaultdict[bytes, set[bytes]](set), Counter[bytes]()
        for example in self.parts["train"]:
            sequence = example.ids.tobytes()
            labels[sequence].add(_bytes_of(example.label))
            count[sequence] += 1
        found = [count[sequence] for sequence, different in labels.items() if len(different) > 1]
        return len(found), sum(found)

    def overlaps(self) -> list[tuple[str, int, str]]:
        """How many proteins of each part have the same sequence as one in train or valid: (part, number, train or
        valid).

        Pairs of parts without such proteins are left out.
        """
        sequences = {part: {example.ids.tobytes() for example in self.parts[part]}
                     for part in ("train", "valid") if part in self.parts}
        found = [(part, sum(example.ids.tobytes() in sequences[other] for example in examples), other)
                 for part, examples in self.parts.items() for other in sequences if part not in ("train", other)]
        return [(part, number, other) for part, number, other in found if number]


def load_task(task: Task, files: dict[str, str], tokenizer: ResidueTokenizer, log: Log | None = None,
              skips: bool = False) -> TaskData:
    """Read the files of a task, given by part; classes are those of `train`.

    Raises DataError for the first bad record or label, or, with `skips`, leaves them out and logs which and how many.
    """
    log = log or Log(is_speaker=False)
    skipped = {part: Skipped() if skips else None for part in files}
    records = read_records(files["train"], task, tokenizer, skipped["train"])
    seen = [] if task.kind in WITHOUT_CLASSES else list(records)
    space = label_space(task, seen, skips)
    if task.kind is None and space.kind == NUMBER and (hint := hint_of_classes(plain(record.label) for record in seen)):
        log.line(f"note: {hint}; --label-kind class if they are classes")
    parts = {"train": _examples(space, seen or records, skipped["train"])}
    parts |= {part: _examples(space, read_records(path, task, tokenizer, skipped[part]), skipped[part])
              for part, path in files.items() if part != "train"}
    for part, of_part in skipped.items():
        if of_part is not None:
            of_part.num_left = len(parts[part])
            of_part.tell(files[part], log)
    return TaskData(task, space, parts)


def read_proteins(path: str, task: Task, tokenizer: ResidueTokenizer, skips: bool, log: Log,
                  sequence_key: str | None = None, name_key: str | None = None) -> list[Example]:
    """The proteins of a file of any format, such as FASTA, without labels.

    `sequence_key` names the key of the sequence; None: the task's own keys or a format's usual one. `name_key`: that of
    the name; None: `id`, if there is one. Raises DataError for the first bad record, or, with `skips`, logs all of them
    and leaves them out.
    """
    keys = (sequence_key,) if sequence_key else tuple(dict.fromkeys((*task.sequence_keys, *SEQUENCE_KEYS)))
    task = replace(task, sequence_keys=keys)
    found, skipped = list[Example](), Skipped()
    for number, place, record in _records(path):
        try:
            values = _sound(place, record)
            name = _name(number, values if name_key is None else {
                DEFAULT_NAME_KEY: _under(place, values, (name_key,), "name")})
            found.append(Example(name, _residues(place, _text(place, values, task), tokenizer)))
        except DataError as error:
            if not skips:
                raise DataError(f"{error}; {REMEDY}") from None
            skipped.add(record.reason if isinstance(record, BadRecord) else "not protein", str(error))
    skipped.num_left = len(found)
    skipped.tell(path, log)
    return found


def read_records(path: str, task: Task, tokenizer: ResidueTokenizer, skipped: Skipped | None = None
                 ) -> Iterator[ProteinRecord]:
    """The proteins of a file in order, with labels as they are in the file; raises DataError for the first bad one, or
    counts them in `skipped` where that is given.

    A protein without an `id` is named by its number, from 1.
    """
    for number, place, record in _records(path):
        try:
            found = _labelled(number, place, _sound(place, record), task, tokenizer)
        except DataError as error:
            if skipped is None:
                raise DataError(f"{error}; {REMEDY}") from None
            skipped.add(record.reason if isinstance(record, BadRecord) else "not protein", str(error))
            continue
        yield found


def _labelled(number: int, place: str, values: dict[str, Any], task: Task, tokenizer: ResidueTokenizer
              ) -> ProteinRecord:
    text = _text(place, values, task)
    ids, num_gaps = _residues(place, text, tokenizer), sum(map(text.count, GAPS))
    label, mask_key = _under(place, values, task.label_keys, "label"), present_key(task.mask_keys, values)
    mask = None if mask_key is None else values[mask_key]
    return ProteinRecord(place, _name(number, values), ids, label, mask, num_gaps)


def _records(path: str) -> Iterator[tuple[int, str, dict[str, Any] | BadRecord]]:
    """Each record's number, from 1, its place in the file, and its values or what is wrong with it."""
    if not os.path.exists(path):
        raise DataError(f"{path}: no such file")
    number = 0
    for block in Source(path).blocks():
        for where, record in records_of(block):
            number += 1
            yield number, f"{block.source}: {where}", record


def _sound(place: str, record: dict[str, Any] | BadRecord) -> dict[str, Any]:
    """The values of a record; raises DataError for a bad record."""
    if isinstance(record, BadRecord):
        raise DataError(f"{place}: {record.message}")
    return record


def _name(number: int, values: dict[str, Any]) -> str:
    key = present_key((DEFAULT_NAME_KEY,), values, any_case=True)
    name = None if key is None else values[key]
    name = name.decode(errors="replace") if isinstance(name, bytes) else name
    return str(number if name in (None, "") else name)


def _bytes_of(label: Any) -> bytes:
    return label.tobytes() if isinstance(label, np.ndarray) else repr(label).encode()


def _examples(space: LabelSpace, records: Iterable[ProteinRecord], skipped: Skipped | None) -> list[Example]:
    """The proteins with their labels as they are learnt; those that cannot be read are counted in `skipped`, or raise
    DataError where that is None.
    """
    found = list[Example]()
    for record in records:
        try:
            found.append(Example(record.name, record.ids, space.read(record)))
        except DataError as error:
            if skipped is None:
                raise
            skipped.add("bad label", str(error))
    return found


def _under(place: str, values: dict[str, Any], keys: tuple[str, ...], what: str) -> Any:
    """The value under the first of `keys` that a record has; raises DataError if it has none of them."""
    key = present_key(keys, values, any_case=True)
    if key is None:
        found = ", ".join(repr(other)[:40] for other in list(values)[:8]) or "nothing"
        wanted = " or ".join(map(repr, keys))
        raise DataError(f"{place}: no {what} under {wanted}; it has {found}. --{what}-key names it")
    return values[key]


def _text(place: str, values: dict[str, Any], task: Task) -> bytes:
    """The sequence of a record as it is in the file; raises DataError if there is none."""
    sequence = _under(place, values, task.sequence_keys, "sequence")
    if not isinstance(sequence, (str, bytes)):
        raise DataError(f"{place}: the sequence is of type {type_name(sequence)}; expected text of residues")
    return sequence.encode(errors="replace") if isinstance(sequence, str) else sequence


def _residues(place: str, text: bytes, tokenizer: ResidueTokenizer) -> np.ndarray:
    """The ids of a sequence, uint8 [r]; raises DataError if it is not a protein."""
    (ids,), problems = tokenizer.encode_many([text])
    if problems:
        raise DataError(f"{place}, column {problems[0].offset + 1} of the sequence: {problems[0].found}")
    if not ids:
        raise DataError(f"{place}: the sequence has no residue")
    return np.frombuffer(ids, dtype=np.uint8)
