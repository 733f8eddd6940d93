"""Kernels: each file or folder holds a plain PyTorch reference, a fast path and the chooser between them.

Begin with `packed_sequence`, the packed proteins and their boundaries, and `device`, which tells the choosers what runs
where. An operation each: `rotary` (positions), `dropout` (in Triton's kernels by `dropout_triton`), `fp8` (matrix
products), `cross_entropy` (on GPUs by `cross_entropy_triton`).

Rooms: `attention/` (inside each protein), `pointwise/` (the rest of a block but its products), `newton_schulz/`
(orthogonalised matrices, for Muon).
"""
