"""What a block does between its matrix products, each in one pass over memory on GPUs.

A file an operation (`residual_norm`, `activation`, `heads`, `convolution`): plain PyTorch, the way by Triton's kernels,
the chooser. The kernels themselves lie in the files that end in `_triton`, which alone import Triton.
"""
