"""Checkpoints of Megatron-LM v2 and ProteinLM: any tensor- and pipeline-parallel size, fp32, fp16 and bf16.

`places` says which files there are, and finds them; `rank_files` reads and writes one for each rank. `reading` joins
their parts into whole tensors, with the `optimizer_state`; `writing` splits them again, with new random-number states
(`randomness`). `names` translates parameters' names and says how each is split, `arguments` translates flags.
"""

from megatron.checkpoint.convert.megatron_v2.places import recognises
from megatron.checkpoint.convert.megatron_v2.reading import read
from megatron.checkpoint.convert.megatron_v2.writing import write

__all__ = ["read", "recognises", "write"]
