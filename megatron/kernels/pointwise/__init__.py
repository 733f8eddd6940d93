"""What a block does between its matrix products, each in one pass over memory.

A file an operation (`residual_norm`, `activation`, `heads`, `convolution`): plain PyTorch, the way by kernels, and the
chooser. `native` has the kernels for CPUs, which the C++ helper computes. `product` is a matrix product whose bias the
next operation may add.

The Triton kernels for GPUs lie in files of their own, which alone import Triton: `residual_norm_triton`,
`activation_triton`, `heads_triton` (with `head_rows_triton`), `convolution_triton`.
"""
