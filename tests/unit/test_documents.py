"""The documents that are packed: their lengths, and that these take no more memory than they need."""

import numpy as np
import pytest

from megatron.data.corpus import documents
from megatron.data.corpus.documents import Documents
from megatron.data.corpus.indexed_writer import IndexedWriter
from megatron.data.corpus.joined import open_corpus

LONGEST = np.iinfo(np.int32).max


def write(prefix, sizes, num_sequences):
    """A dataset of those sequences, whose ids are a hole in the file."""
    with IndexedWriter(prefix) as writer:
        writer.add(np.zeros(0, np.uint16), np.array(sizes), np.array(num_sequences))
    with open(f"{prefix}.bin", "r+b") as file:
        file.truncate(2 * sum(sizes))
    return open_corpus("a", (str(prefix),))


@pytest.mark.parametrize(("sizes", "num_sequences", "expected", "dtype"), [
    ([3, 5, 2, 1], [1, 0, 2, 1], [3, 0, 7, 1], np.int32),
    ([3, LONGEST, 1, LONGEST], [1, 0, 2, 1], [3, 0, LONGEST + 1, LONGEST], np.int64)])
def test_lengths_take_4_bytes_a_document_unless_a_sum_needs_8(tmp_path, monkeypatch, sizes, num_sequences, expected,
                                                             dtype):
    indexed = write(tmp_path / "a", sizes, num_sequences)
    for chunk in (1, 3, 100):
        monkeypatch.setattr(documents, "CHUNK_DOCUMENTS", chunk)
        for first in range(3):
            lengths = Documents(indexed, range(first, 4)).lengths
            assert lengths.tolist() == expected[first:] and lengths.dtype == dtype
