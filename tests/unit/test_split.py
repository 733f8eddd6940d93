"""--split takes shares, rounded as by Megatron, or exact counts."""

import pytest

from megatron.data.corpus.split import split_documents
from megatron.errors import ConfigError


@pytest.mark.parametrize("split, documents, counts", [
    ("969,30,1", 4000, (3876, 120, 4)),
    ("969,30,1", 50, (48, 2, 0)),
    ("949,50,1", 1000, (949, 50, 1)),
    ("1,0,0", 50, (50, 0, 0)),
    ("98/2", 200, (196, 4, 0)),
    ("0.8,0.1,0.1", 7, (5, 1, 1)),
    ("100", 9, (9, 0, 0)),
    ("32593668,1715454,44311", 34353433, (32593668, 1715454, 44311)),
    ("32593668,1715454,44311", 40000000, (32593668, 1715454, 44311)),
    ("2000,100,10", 3000, (2000, 100, 10)),
    ("2000,1000,1000", 400, (200, 100, 100)),
    ("1,1,1", 2, (1, 1, 0)),
    ("0.6,1.7,1.7", 4, (1, 2, 1)),
])
def test_documents_are_split_into_runs_of_these_counts(split, documents, counts):
    parts = split_documents(split, documents)
    assert tuple(map(len, parts)) == counts
    assert parts[0].start == 0 and parts[0].stop == parts[1].start and parts[1].stop == parts[2].start <= documents


@pytest.mark.parametrize("split, documents", [("0,1,0", 100), ("1,999,0", 50), ("969,30,1", 0)])
def test_a_train_share_that_comes_out_empty_is_an_error(split, documents):
    with pytest.raises(ConfigError, match=f"--split {split} leaves no protein for training"):
        split_documents(split, documents)


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,2", "nan", "0,0,0"])
def test_a_malformed_split_is_an_error(split):
    with pytest.raises(ConfigError, match="is not one to three shares"):
        split_documents(split, 10)
