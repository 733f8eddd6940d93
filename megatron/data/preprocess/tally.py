"""The counts of preprocessing: records, kept and dropped, residues, letters, lengths."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron.data.corpus.vocab import Vocab

LENGTH_EDGES = (1, 30, 50, 100, 200, 300, 400, 512, 768, 1024, 1536, 2048, 4096, 8192, 16384, 32768)
_MANY_IDS = 256


@dataclass
class DocumentTally:
    """Counts over documents; the tallies of several blocks can be added."""

    num_records: int = 0
    num_kept: int = 0
    num_empty: int = 0  # of those kept
    num_blank_lines: int = 0
    num_sequences: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # by reason
    ids: np.ndarray = field(default_factory=lambda: np.zeros(_MANY_IDS, dtype=np.int64))  # how often each id occurs
    # Documents by length: below LENGTH_EDGES[0], then from each edge to below the next.
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(len(LENGTH_EDGES) + 1, dtype=np.int64))
    shortest: int | None = None
    longest: int | None = None

    def count_documents(self, ids: bytes, lengths: np.ndarray) -> None:
        """Count kept documents, given their ids, one byte each, and their lengths."""
        self.num_kept += len(lengths)
        self.num_empty += int(np.count_nonzero(lengths == 0))
        self.ids += count_ids(ids)
        self.histogram += np.bincount(np.searchsorted(LENGTH_EDGES, lengths, side="right"),
                                      minlength=len(self.histogram))
        if len(lengths):
            self._stretch(int(lengths.min()), int(lengths.max()))

    def add(self, other: "DocumentTally") -> None:
        """Add the counts of another tally."""
        self.num_records += other.num_records
        self.num_kept += other.num_kept
        self.num_empty += other.num_empty
        self.num_blank_lines += other.num_blank_lines
        self.num_sequences += other.num_sequences
        self.dropped += other.dropped
        self.ids += other.ids
        self.histogram += other.histogram
        if other.shortest is not None and other.longest is not None:
            self._stretch(other.shortest, other.longest)

    def state(self) -> dict[str, Any]:
        """All counts in a form that JSON can hold; `from_state` restores them."""
        return {**vars(self), "dropped": dict(self.dropped), "ids": self.ids.tolist(),
                "histogram": self.histogram.tolist()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "DocumentTally":
        """The tally with this `state`."""
        return cls(**{**state, "dropped": Counter(state["dropped"]), "ids": np.array(state["ids"]),
                      "histogram": np.array(state["histogram"])})

    @classmethod
    def from_report(cls, report: dict[str, Any], vocab: Vocab) -> "DocumentTally":
        """The tally with this `report`; raises KeyError, TypeError or ValueError if it is not a report."""
        ids = np.zeros(_MANY_IDS, dtype=np.int64)
        for token, count in report["letters"].items():
            ids[vocab.ids[token]] = count
        histogram = np.array([report["length_histogram"][label] for label in _length_labels()], dtype=np.int64)
        return cls(report["records"], report["kept"], report["empty_kept"], report["blank_lines"], report["sequences"],
                   Counter(report["dropped"]), ids, histogram, report["length"]["shortest"],
                   report["length"]["longest"])

    def report(self, vocab: Vocab) -> dict[str, Any]:
        """The counts as they are in the statistics file, in a form that JSON can hold."""
        num_residues = int(self.ids.sum())
        return {
            "records": self.num_records, "kept": self.num_kept, "empty_kept": self.num_empty,
            "dropped": dict(sorted(self.dropped.items())), "blank_lines": self.num_blank_lines,
            "sequences": self.num_sequences, "residues": num_residues,
            "length": {"shortest": self.shortest, "longest": self.longest,
                       "mean": round(num_residues / self.num_kept, 2) if self.num_kept else None},
            "length_histogram": dict(zip(_length_labels(), self.histogram.tolist(), strict=True)),
            "letters": {vocab.tokens[i]: int(self.ids[i]) for i in np.argsort(-self.ids, kind="stable") if self.ids[i]},
        }

    def _stretch(self, shortest: int, longest: int) -> None:
        self.shortest = shortest if self.shortest is None else min(self.shortest, shortest)
        self.longest = longest if self.longest is None else max(self.longest, longest)


def count_ids(ids: bytes) -> np.ndarray:
    """How often each byte value occurs, int64 [256]; counts pairs of bytes, which takes half the time."""
    even = len(ids) - len(ids) % 2
    pairs = np.bincount(np.frombuffer(ids, np.uint16, even // 2), minlength=_MANY_IDS**2)
    pairs = pairs.reshape(_MANY_IDS, _MANY_IDS)
    counts = pairs.sum(axis=0) + pairs.sum(axis=1)
    if even < len(ids):
        counts[ids[-1]] += 1
    return counts


def describe(report: dict[str, Any]) -> Iterable[str]:
    """Lines for the user that summarise a `DocumentTally.report`."""
    dropped = ", ".join(f"{reason} {count:,}" for reason, count in report["dropped"].items()) or "none"
    length = report["length"]
    yield f"records {report['records']:,}, kept {report['kept']:,}, dropped: {dropped}"
    yield (f"residues {report['residues']:,}, lengths {length['shortest']} to {length['longest']}, "
           f"mean {length['mean']}, empty {report['empty_kept']:,}")
    yield "lengths  " + "  ".join(f"{label}: {count:,}" for label, count in report["length_histogram"].items() if count)
    total = max(report["residues"], 1)
    yield "letters  " + "  ".join(f"{token} {count / total:.2%}" for token, count in report["letters"].items())


def _length_labels() -> list[str]:
    """The names of the histogram's bins."""
    inner = [f"{low}-{high - 1}" for low, high in zip(LENGTH_EDGES, LENGTH_EDGES[1:], strict=False)]
    return ["0", *inner, f"{LENGTH_EDGES[-1]} or more"]
