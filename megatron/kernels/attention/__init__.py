"""Attention inside each protein: `packed` computes it by the back-end that `backends` chooses.

The back-ends: `fused` (varlen_attn and Triton's kernels), `flex`, `native` (the C++ helper), `by_protein`. `maps` gives
probabilities. `triton_kernels` has the Triton kernels of `fused`, which `launches` starts; `maps_triton` has that of
`maps`.
"""
