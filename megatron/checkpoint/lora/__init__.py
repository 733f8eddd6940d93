"""Low-rank adapters in checkpoints: reading and writing peft's files, and merging adapters into the weights."""
