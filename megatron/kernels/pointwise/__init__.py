"""What a block does between its matrix products, each in one pass over memory on GPUs.

A file an operation (`residual_norm`, `activation`, `heads`, `convolution`): plain PyTorch, the way by Triton's kernels,
the chooser. `native` has the operations on CPUs, by the C++ helper, `product` is a product whose bias the next may add.

The Triton kernels lie in files of their own, which alone import Triton: `residual_norm_triton`, `activation_triton`,
`heads_triton` (with `head_rows_triton`), `convolution_triton`.
"""
