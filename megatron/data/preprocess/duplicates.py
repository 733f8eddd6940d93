"""Finds duplicate proteins by 128-bit digests; takes 16 bytes of memory for each distinct protein, 40 while merging."""

import numpy as np

from megatron.data.preprocess.encode import DIGEST_BYTES


class SeenDigests:
    """The set of digests seen so far, in sorted runs of doubling length, so that adding stays cheap for any number."""

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def add(self, digests: bytes) -> np.ndarray:
        """Add digests, DIGEST_BYTES each; returns which of them are new, bool [n] (of equal ones, the first)."""
        pairs = np.frombuffer(digests, np.uint64).reshape(-1, DIGEST_BYTES // 8).T
        order = np.lexsort(pairs[::-1])
        ordered = pairs[:, order]
        is_new_ordered = np.ones(len(order), dtype=bool)
        is_new_ordered[1:] = (ordered[:, 1:] != ordered[:, :-1]).any(axis=0)
        for run in self._runs:
            at = np.searchsorted(run[0], ordered[0])
            at[at == run.shape[1]] = 0
            is_new_ordered &= (run[:, at] != ordered).any(axis=0)
        self._keep(ordered[:, is_new_ordered])
        is_new = np.empty(len(order), dtype=bool)
        is_new[order] = is_new_ordered
        return is_new

    def _keep(self, run: np.ndarray) -> None:
        """Add a sorted run, merged with shorter or similar ones."""
        while self._runs and self._runs[-1].shape[1] <= 2 * run.shape[1]:
            run = np.concatenate([self._runs.pop(), run], axis=1)
            run = run[:, np.lexsort(run[::-1])]
        if run.size:
            self._runs.append(run)
