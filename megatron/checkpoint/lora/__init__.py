"""Low-rank adapters in checkpoints: `merging` adds them to the weights, `peft_files` writes them in peft's files."""
