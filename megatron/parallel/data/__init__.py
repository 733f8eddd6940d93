"""Data parallelism: gradients are summed over the ranks that see different tokens.

`data_parallel` chooses between parameters replicated on every rank (`replicated`, also by torch's DDP) and sharded over
the ranks (`sharded`, by FSDP2); `sums` adds gradients in buckets.
"""
