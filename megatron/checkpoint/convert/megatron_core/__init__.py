"""Checkpoints of megatron-core's BERT (`pretrain_bert.py` of current Megatron-LM): weights in and out, in both forms.

FOLDER/latest_checkpointed_iteration.txt                   the number of the newest, or `release`
FOLDER/iter_0000100/mp_rank_TT[_PPP]/model_optim_rng.pt    `ranks`: tensor rank TT of pipeline rank PPP, a file each
FOLDER/iter_0000100/.metadata, __0_0.distcp, …             `distributed`: one for every layout (torch_dist)

The arithmetic is ours, where the arguments that change it are refused: LayerNorm before each half, residuals from
before it, GeLU in the tanh form where it is fused with the bias and else exact, exact GeLU in the head, rows of
queries, keys and values grouped by head. The optimizer's state is neither read nor written.
"""
