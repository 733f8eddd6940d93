"""The nearest matrix with orthogonal rows, approximately: Newton-Schulz iteration, and its symmetric products.

`orthogonal` iterates; `symmetric` multiplies, on GPUs by Triton's kernel in `symmetric_triton`.
"""
