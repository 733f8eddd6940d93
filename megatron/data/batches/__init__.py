"""Micro-batches of rows, made ahead of the step."""
