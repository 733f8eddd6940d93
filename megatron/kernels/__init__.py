"""Kernels: each file or folder holds a plain PyTorch reference, a fast path and the chooser between them."""
