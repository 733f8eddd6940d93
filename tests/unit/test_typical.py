"""Made-up micro-batches have the properties of those made from data."""

import pytest

from megatron.config import DataConfig
from megatron.data.batches.typical import typical_batch, typical_lengths


@pytest.mark.parametrize("seq_length", [3, 64, 299, 300, 301, 302, 1024])
@pytest.mark.parametrize(("ends", "num_ends"), [("start", 1), ("both", 2)])
def test_rows_are_full_of_proteins_that_hold_their_ends(seq_length, ends, num_ends):
    lengths = typical_lengths(seq_length, num_ends)
    batch = typical_batch(DataConfig(seq_length=seq_length, protein_ends=ends), 2)
    assert sum(lengths) == seq_length and min(lengths) >= num_ends
    assert batch.num_tokens == 2 * seq_length
    assert batch.num_residues == 2 * (seq_length - num_ends * len(lengths))
    assert 0 < batch.num_targets <= max(2, 0.16 * batch.num_residues + 1)
    assert batch.sequence.max_length == max(lengths)
    assert batch.targets.positions_m.max() < 2 * seq_length - num_ends + 1
