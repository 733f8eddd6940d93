"""Checkpoints: saved atomically, loaded without executing any code.

A run's folder: `store` finds and removes the checkpoints in it, `claim` is its lock, `places` names its files,
`metrics` reads and writes metrics.jsonl. A checkpoint of any format is read as a table of tensors, `contents`.

Saving: `saving` takes a run's state, `sharded` writes each rank's part, `tensor_file` one safetensors file, `manifest`
the checksums. Loading: `newest` opens what --load names, `whole` a checkpoint that is one file of weights, `loading`
gives each rank its part. `contact_head` is the file of a contact regression, `failures` makes errors readable.

Rooms: `convert/` (every format, and converting between them), `lora/` (low-rank adapters).
"""
