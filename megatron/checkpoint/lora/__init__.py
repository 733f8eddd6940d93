"""Low-rank adapters in checkpoints: writing peft's files, and merging adapters into the weights."""
