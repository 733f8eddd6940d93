"""Defines tasks: the kind of their labels, the keys in a record, the metrics, and TAPE's file names.

TAPE (Rao et al., 2019, arXiv 1906.08230) stores records as LMDB or JSON with the keys below; FLIP and others, as CSV or
JSON lines, call the sequence `seq` or `sequence`. Tasks of the user's own have the name OWN.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron.errors import ConfigError, DataError

# The kinds of labels: one number, one class, or any of several classes a protein; one class, or one number, a residue;
# which residues touch, told by coordinates (of C-alpha atoms, as CASP and TAPE count) or by pairs.
NUMBER, CLASS, CLASSES, RESIDUES, NUMBERS, CONTACTS = LABEL_KINDS = (
    "number", "class", "classes", "residues", "numbers", "contacts")
WITHOUT_CLASSES = (NUMBER, NUMBERS, CONTACTS)  # known without having seen every label

# As `metrics.measure` names them; the first one chooses the best of several evaluations, unless classes are balanced.
METRICS = {
    NUMBER: ("spearman", "pearson", "mse", "mae"),
    CLASS: ("accuracy", "mcc", "f1_macro"),
    CLASSES: ("f1_max", "f1_micro", "f1_macro"),
    RESIDUES: ("accuracy", "mcc", "f1_macro"),
    NUMBERS: ("spearman", "pearson", "mse", "mae"),
    CONTACTS: tuple(f"{reach}_p_at_{size}" for reach in ("medium_long", "long", "medium", "short")
                    for size in ("l5", "l2", "l")),
}
ERRORS = frozenset(("mse", "mae"))  # smaller is better, and they have the scale of the labels
BALANCED = {CLASS: "mcc", CLASSES: "f1_macro", RESIDUES: "mcc"}  # chooses with --class-weights balanced
SEQUENCE_KEYS = ("primary", "seq", "sequence", "text")
LABEL_KEYS = ("label", "labels", "target")
MASK_KEYS = ("mask", "valid_mask")


@dataclass(frozen=True)
class Task:
    """A task. Of several keys, the first that a file has is used. `kind` None: inferred from the labels.

    class_names: given if the task defines the classes and their order; a whole number as a label is then an index into
    them. uncounted: labels of residues that do not count, besides null and -1. stems: how TAPE's file names begin.
    pairs_from: the number of the first residue, if contacts are lists of pairs and it was given.
    """

    name: str
    kind: str | None
    label_keys: tuple[str, ...] = LABEL_KEYS
    mask_keys: tuple[str, ...] = MASK_KEYS
    sequence_keys: tuple[str, ...] = SEQUENCE_KEYS
    class_names: tuple[str, ...] | None = None
    uncounted: tuple[str, ...] = ()
    stems: tuple[str, ...] = ()
    pairs_from: int | None = None


# TAPE numbers eight classes in NetSurfP-2.0's order, GHIBESTC, and three of them HHHEECCC. Its `valid_mask` is 0 where
# CB513 is not to be judged; `disorder` is 1 where a residue is resolved, and --mask-key takes it.
TASKS = {task.name: task for task in (
    Task("secondary_structure", RESIDUES, ("ss3",), class_names=tuple("HEC"), stems=("secondary_structure",)),
    Task("secondary_structure_8", RESIDUES, ("ss8",), class_names=tuple("GHIBESTC"), uncounted=("-",),
         stems=("secondary_structure",)),
    Task("contacts", CONTACTS, ("tertiary", "ca"), ("valid_mask",), stems=("proteinnet", "contacts")),
    Task("remote_homology", CLASS, ("fold_label",), stems=("remote_homology",)),
    Task("fluorescence", NUMBER, ("log_fluorescence",), stems=("fluorescence",)),
    Task("stability", NUMBER, ("stability_score", "stability"), stems=("stability",)),
)}
OWN = "own"
TASK_NAMES = (*TASKS, OWN)

_PART = r"(?P<part>train|valid|test\w*|cb513|ts115|casp12)"
_ENDING = r"\.(lmdb|json|jsonl|csv|tsv|parquet|arrow)(\.gz|\.zst)?"


def task_of(name: str, *, sequence_key: str | None = None, label_key: str | None = None, mask_key: str | None = None,
            label_kind: str | None = None, pairs_from: int | None = None) -> Task:
    """The task of this name, with the user's keys and kind of labels where given.

    Raises ConfigError for an unknown name, and for a kind that contradicts a named task's own labels.
    """
    if name not in TASK_NAMES:
        raise ConfigError(f"the task is {name}; it must be one of {', '.join(TASK_NAMES)}")
    task = TASKS.get(name, Task(OWN, None))
    if label_key is not None and label_key not in task.label_keys:
        # Other labels of a task's proteins, such as TAPE's `family_label`: of the same kind unless it is said.
        task = replace(task, label_keys=(label_key,), class_names=None, kind=label_kind or task.kind)
    elif label_key is not None:
        task = replace(task, label_keys=(label_key,))
    if label_kind not in (None, task.kind) and task.kind is not None:
        raise ConfigError(f"--label-kind is {label_kind}, but the labels of {name} are of the kind {task.kind}; take "
                          f"the task {OWN}, or name other labels with --label-key")
    return replace(task, kind=label_kind or task.kind,
                   sequence_keys=(sequence_key,) if sequence_key else task.sequence_keys,
                   mask_keys=(mask_key,) if mask_key else task.mask_keys, pairs_from=pairs_from)


def split_files(task: Task, folder: str) -> dict[str, str]:
    """The file of each part, train and valid first, in a folder with TAPE's names (`STEM_PART.lmdb`) or
    `PART.jsonl.gz`.

    Files may be in the folder itself or in a subfolder named after the task, as when TAPE's archives are unpacked
    together. Raises DataError if there is no training file, or if two files are of one part.
    """
    names = (*task.stems, task.name)
    pattern = re.compile(rf"((?:{'|'.join(map(re.escape, names))})_)?{_PART}{_ENDING}")
    for place in (folder, *(os.path.join(folder, name) for name in names)):
        found: dict[str, str] = {}
        for name in _listed(place):
            match = pattern.fullmatch(name)
            if match is None:
                continue
            part = match["part"]
            if part in found:
                raise DataError(f"{place}: has two files of the part {part}, {os.path.basename(found[part])} and "
                                f"{name}; move one of them away, or name the files themselves")
            found[part] = os.path.join(place, name)
        if "train" in found:
            return {part: found[part] for part in sorted(found, key=_order)}
    raise DataError(f"{folder}: holds no training file of {task.name}; expected {names[0]}_train.lmdb or "
                    "train.jsonl.gz, .csv.gz, .parquet, …")


def present_key(keys: Sequence[str], record: dict[str, object], any_case: bool = False) -> str | None:
    """The key of a record that is the first of `keys` in it; None if it has none.

    `any_case`: else the first that a single key of the record is in another case, as `Sequence` is `sequence`.
    """
    found = next((key for key in keys if key in record), None)
    if found is not None or not any_case:
        return found
    alike = ([name for name in record if isinstance(name, str) and name.lower() == key.lower()] for key in keys)
    return next((names[0] for names in alike if len(names) == 1), None)


def _order(part: str) -> tuple[int, str]:
    return ("train", "valid").index(part) if part in ("train", "valid") else 2, part


def _listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []
