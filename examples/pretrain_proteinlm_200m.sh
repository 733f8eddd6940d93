#!/usr/bin/env bash
# Pretrains the published ProteinLM of 200 million parameters (16 layers x 1024, 16 heads) on one machine with 8 GPUs.
#
#     DATA_PATH=pfam_text_document bash examples/pretrain_proteinlm_200m.sh [any flag of pretrain_tape.py]
#
# Whatever examples/pretrain_tape_distributed.sh takes from outside is taken here too. The layout:
#
#     The model fits each GPU, so the GPUs share out rows alone: data parallel. 200 million parameters in fp32 with
#     gradients and two moments of Adam are 3.2 GB; --data-parallel-sharding optimizer leaves an eighth of the moments
#     on each GPU, at no more communication.
#     The global batch is that of the original, 4 rows on each of 4 x 8 GPUs, for its learning rate belongs to it: here
#     each GPU takes 4 x 4 rows a step. On other numbers of GPUs the run is the same.
set -euo pipefail

export PRESET=proteinlm-200m
exec bash "$(dirname "${BASH_SOURCE[0]}")/pretrain_tape_distributed.sh" \
    --data-parallel-sharding optimizer --global-batch-size 128 "$@"
