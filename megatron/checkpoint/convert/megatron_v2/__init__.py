"""Checkpoints of Megatron-LM v2 and ProteinLM: any tensor- and pipeline-parallel size, fp32, fp16 and bf16.

FOLDER/latest_checkpointed_iteration.txt                   an iteration as decimal text, or `release`
FOLDER/iter_0000100/mp_rank_TT[_PPP]/model_optim_rng.pt    tensor rank TT of pipeline rank PPP, saved by torch.save
FOLDER/release/mp_rank_TT[_PPP]/model_optim_rng.pt         weights only

Not supported: the distributed optimizer and experts. Megatron-core has a format of its own (`megatron_core`).
"""

from megatron.checkpoint.convert.megatron_v2.places import recognises
from megatron.checkpoint.convert.megatron_v2.reading import read
from megatron.checkpoint.convert.megatron_v2.writing import write

__all__ = ["read", "recognises", "write"]
