#!/usr/bin/env bash
# Pretrains the published ProteinLM of 3 billion parameters (36 layers x 2560, 40 heads) on machines with 8 GPUs each.
#
#     DATA_PATH=pfam_text_document bash examples/pretrain_proteinlm_3b.sh [any flag of pretrain_tape.py]
#
# Whatever examples/pretrain_tape_distributed.sh takes from outside is taken here too, so on several machines, each:
#
#     NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 MAX_RESTARTS=3 DATA_PATH=… bash examples/pretrain_proteinlm_3b.sh
#
# The layout:
#
#     4 neighbouring GPUs, which NVLink joins, share each layer (tensor parallel): 10 of the 40 heads each, and with
#     --sequence-parallel a quarter of the tokens of everything between. The preset recomputes activations.
#     Between these groups, inside a machine and across, data parallel: one reduction of the gradients a step. The
#     moments of Adam are shared out over the groups. In fp32 a GPU holds parameters of 2.8 GB, as much of gradients,
#     and moments of 5.7 GB divided by the number of groups: 2 on one machine.
#     A global batch of 1,024 rows is 2.2 million residues; the original's is not published.
set -euo pipefail

export PRESET=proteinlm-3b
exec bash "$(dirname "${BASH_SOURCE[0]}")/pretrain_tape_distributed.sh" --tensor-model-parallel-size 4 \
    --sequence-parallel --data-parallel-sharding optimizer --global-batch-size 1024 "$@"
