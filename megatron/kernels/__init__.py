"""Kernels: each file holds a plain PyTorch reference, a fast path and the chooser between them."""
