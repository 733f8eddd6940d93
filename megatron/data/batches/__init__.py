"""Micro-batches of rows, prepared ahead of the training step by worker processes."""
