"""Splits a corpus into consecutive ranges of documents for training, validation and test."""

import math

from megatron.errors import ConfigError


def split_documents(split: str, num_documents: int) -> tuple[range, range, range]:
    """The document ranges of training, validation and test for `--split`; raises ConfigError.

    As in Megatron, shares are normalised and each boundary is rounded. But whole numbers that sum to more than 1,000,
    which shares usually do not, and to at most the number of documents, are exact counts.
    """
    shares = shares_of(split)
    counts = [int(share) for share in shares]
    if not (counts == shares and 1000 < sum(counts) <= num_documents):
        counts = _counts_of_shares(shares, num_documents)
    bounds = [0, counts[0], counts[0] + counts[1], sum(counts)]
    if counts[0] == 0:
        raise ConfigError(f"--split {split} leaves no protein for training (of {num_documents} documents); "
                          "give a larger first number, or more data")
    train, valid, test = (range(bounds[part], bounds[part + 1]) for part in range(3))
    return train, valid, test


def shares_of(split: str) -> list[float]:
    """The three shares or counts in `--split`, 0 for those left out; raises ConfigError."""
    try:
        shares = [float(part) for part in split.replace("/", ",").split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or not all(math.isfinite(s) and s >= 0 for s in shares) or sum(shares) <= 0:
        raise ConfigError(f"--split {split} is not one to three shares or counts by commas, such as 969,30,1")
    return shares + [0.0] * (3 - len(shares))


def _counts_of_shares(shares: list[float], num_documents: int) -> list[int]:
    total = sum(shares)
    bounds = [0]
    for share in shares:
        bounds.append(bounds[-1] + round(share / total * num_documents))
    excess = bounds[-1] - num_documents
    if excess == bounds[1] == 1:  # Megatron would take the only protein of training away, so test gives one up instead
        bounds[-1] = num_documents
    else:
        bounds = [0, *(max(0, bound - excess) for bound in bounds[1:])]
    return [high - low for low, high in zip(bounds, bounds[1:], strict=False)]
