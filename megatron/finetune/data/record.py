"""A labelled protein as it is in a file, and checks that all kinds of labels share. Shapes: r residues."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.data.corpus.tokenizer import MISSING_VALUES
from megatron.errors import DataError
from megatron.infer.skipped import FLAG

_SHOWN, _NAMES, _SHOWN_OF_NAME, _SHOWN_OF_NAMES = 40, 12, 20, 80  # characters, names, and characters of these
_MISSING = {"", "n/a", "<NA>", *(value.decode() for value in MISSING_VALUES)}  # as in pandas
BY_SKIPPING = f", as {FLAG} does"
_MASKS: dict[Any, bool] = {"0": False, "1": True, 0: False, 1: True}


@dataclass(frozen=True)
class ProteinRecord:
    """A protein as it is in a file. `place`: file and line or record; `ids`: its residues in the vocabulary.

    `num_gaps`: the number of gaps (`-` and `.`) in the file's sequence, which were removed.
    """

    place: str
    name: str
    ids: np.ndarray  # uint8 [r]
    label: Any = None
    mask: Any = None
    num_gaps: int = 0

    def wrong(self, finding: str) -> DataError:
        """An error about this record."""
        return DataError(f"{self.place}: {finding}")

    def present(self, of_several: bool = False) -> Any:
        """The label as a plain Python value; raises DataError if it is missing.

        `of_several`: the protein may have several classes, or none, and the message says how to write none.
        """
        value = plain(self.label)
        if value is None or (isinstance(value, str) and not value.strip()):
            raise self.missing("of a protein of no class it is ; alone, or []" if of_several else "")
        return value

    def has_label(self, is_table: bool) -> bool:
        """Whether the label is there; with `is_table`, texts for missing values count as none (`is_missing`)."""
        value = plain(self.label)
        return value is not None and not (isinstance(value, str) and not value.strip()) and not (
            is_table and is_missing(value))

    def missing(self, remark: str = "") -> DataError:
        """An error about a missing label."""
        return self.wrong(f"the label is missing{remark and f' ({remark})'}; give it, or leave the record out"
                          f"{BY_SKIPPING}")

    def counts(self) -> np.ndarray:
        """Which residues count according to the record's mask, bool [r]; all without a mask. Raises DataError."""
        mask = plain(self.mask)
        if mask is None:
            return np.ones(len(self.ids), dtype=bool)
        if not isinstance(mask, (str, list)):
            raise self.wrong(f"the mask {shown(mask)} is neither text nor a list with 0 or 1 for each residue")
        if len(mask) != len(self.ids):
            raise self.wrong(f"{self.residues_for(len(mask))}, but a mask of {len(mask)}")
        bad = [value for value in mask if not isinstance(value, (str, int, float)) or value not in _MASKS]
        if bad:
            raise self.wrong(f"the mask has {shown(bad[0])}; expected 0 or 1 for each residue")
        return np.array([_MASKS[value] for value in mask])

    def check_length(self, things: str, number: int) -> None:
        """Raises DataError if `number`, that of `things` in the label, is not that of residues."""
        if number != len(self.ids):
            raise self.wrong(f"{self.residues_for(number)}, but {number} {things} in the label")

    def residues_for(self, number: int) -> str:
        """The number of residues as text, with a note about removed gaps if they explain why there are `number` items.
        """
        residues = f"{len(self.ids):,} residues"
        if not self.num_gaps or number != len(self.ids) + self.num_gaps:
            return residues
        return f"{residues} (gaps, - or ., are none, and the sequence has {self.num_gaps:,})"


def as_number(value: Any) -> float | None:
    """The number that a value is or spells; None if it is not a number."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or "_" in str(value):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def is_missing(value: Any) -> bool:
    """Whether a value is a text that tables have where nothing is known."""
    return isinstance(value, str) and value.strip() in _MISSING


def plain(value: Any) -> Any:
    """A value of NumPy, or bytes, as a plain Python value."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def shown(value: Any) -> str:
    """A value as messages show it, cut if it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def shown_counts(names: Sequence[str], counts: Sequence[int]) -> str:
    """Names with their counts: the first dozen, cut if they are long."""
    short = [f"{_cut(name)} {count:,}" for name, count in zip(names[:_NAMES], counts, strict=False)]
    return ", ".join(short) + (", …" if len(names) > len(short) else "")


def shown_names(names: Sequence[str]) -> str:
    """Names as messages show them: the first few, cut if they are long, and how many there are."""
    short = [_cut(name) for name in names[:_NAMES]]
    while len(short) > 2 and sum(map(len, short)) > _SHOWN_OF_NAMES:
        short.pop()
    return ", ".join(short) + (f", … ({len(names):,} in all)" if len(names) > len(short) else "")


def _cut(name: str) -> str:
    return name if len(name) <= _SHOWN_OF_NAME else name[:_SHOWN_OF_NAME] + "…"
