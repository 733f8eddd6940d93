"""Micro-batches of rows, prepared ahead of the training step by worker processes.

`loader` prepares them, `batch` makes one from its rows, `order` leaves out the samples that are not to be trained on.
`typical` makes an artificial one, for estimates.
"""
