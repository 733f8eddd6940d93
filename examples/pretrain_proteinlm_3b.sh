#!/usr/bin/env bash
# Pretrains the published ProteinLM model of 3 billion parameters (36 layers x 2560, 40 heads), on machines with 8 GPUs
# each.
#
#     DATA_PATH=pfam_text_document bash examples/pretrain_proteinlm_3b.sh [any flag of pretrain_tape.py]
#
# You can set every variable of examples/pretrain_tape_distributed.sh here too. On several machines, run on each:
#
#     NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 MAX_RESTARTS=3 DATA_PATH=… bash examples/pretrain_proteinlm_3b.sh
#
# The layout:
#
#     4 neighbouring GPUs, connected by NVLink, split each layer (tensor parallelism): each has 10 of the 40 heads and,
#     with --sequence-parallel, a quarter of the tokens between the split layers. The preset recomputes activations.
#     Between these groups, within a machine and across machines, there is data parallelism: one reduction of the
#     gradients a step. Adam's moments are sharded over the groups. In fp32, a GPU holds 2.8 GB of parameters, as much
#     of gradients, and 5.7 GB of moments divided by the number of groups (2 on one machine).
#     A global batch of 1,024 rows is 2.2 million residues; the original batch size is not published.
set -euo pipefail

export PRESET=proteinlm-3b
exec bash "$(dirname "${BASH_SOURCE[0]}")/pretrain_tape_distributed.sh" --tensor-model-parallel-size 4 \
    --sequence-parallel --data-parallel-sharding optimizer --global-batch-size 1024 "$@"
