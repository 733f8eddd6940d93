"""Writes predicted contacts: all scores in one file, in a format of embeddings, or a table of pairs per protein.

Shapes: r residues of a protein.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from megatron.files import write_text
from megatron.infer.answers import Asked
from megatron.infer.contacts.chains import LEAST_SEPARATION
from megatron.infer.embed.writers import writer
from megatron.infer.proteins import file_name

Write = Callable[[str, np.ndarray], None]


@contextmanager
def output(path: Path, threshold: float | None, score: str) -> Iterator[Write]:
    """A context that yields a function which writes one protein's scores [r, r] under its name.

    If `path` has an ending (.npz, .h5 or .parquet), all scores go into that file, which appears when the context ends
    without an error. Otherwise the pairs of `best_pairs` go into PATH/NAME.tsv; `score` is the header of their column.
    """
    if path.suffix:
        with writer(path, Asked(("contacts",), ())) as write_answer:
            yield lambda name, scores_rr: write_answer(name, len(scores_rr), {"contacts": scores_rr})
        return
    path.mkdir(parents=True, exist_ok=True)

    def write(name: str, scores_rr: np.ndarray) -> None:
        lines = (f"{first}\t{second}\t{value:.4f}\n" for first, second, value in best_pairs(scores_rr, threshold))
        write_text(path / f"{file_name(name)}.tsv", f"i\tj\t{score}\n{''.join(lines)}")

    yield write


def best_pairs(scores_rr: np.ndarray, threshold: float | None) -> list[tuple[int, int, float]]:
    """Pairs of residues, numbered from 1, with their scores, in descending order of score.

    Only pairs at least LEAST_SEPARATION apart in the sequence: those above `threshold`, or if it is None the r best.
    """
    first, second = np.triu_indices(len(scores_rr), LEAST_SEPARATION)
    scores = scores_rr[first, second]
    order = np.argsort(-scores, kind="stable")
    order = order[:len(scores_rr)] if threshold is None else order[scores[order] > threshold]
    return [(int(first[place]) + 1, int(second[place]) + 1, float(scores[place])) for place in order]
