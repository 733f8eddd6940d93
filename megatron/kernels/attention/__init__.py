"""Attention inside each protein: `packed` computes it by the back-end that `backends` chooses.

The back-ends: `fused` (varlen_attn and Triton's kernels), `flex`, `compiled`, `by_protein`; `maps` gives probabilities.
"""
