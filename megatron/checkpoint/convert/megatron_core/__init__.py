"""Weights of megatron-core's BERT (`pretrain_bert.py` of current Megatron-LM), read and written in both its formats.

FOLDER/latest_checkpointed_iteration.txt                   the iteration of the newest, or "release"
FOLDER/iter_0000100/mp_rank_TT[_PPP]/model_optim_rng.pt    `ranks`: a file for each tensor rank TT and pipeline rank PPP
FOLDER/iter_0000100/.metadata, __0_0.distcp, …             `distributed`, by `distributed_files`: of any layout

`arguments` and `names` translate flags and parameters' names; `weights` prepares what is written.
Only models whose arithmetic ours can match are read; other arguments are refused. That is: pre-LayerNorm blocks with
residuals from before the LayerNorm; tanh GeLU if it is fused with the bias, else exact GeLU; exact GeLU in the head;
rows of queries, keys and values grouped by head. The optimizer's state is neither read nor written.
"""
