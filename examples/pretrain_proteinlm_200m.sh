#!/usr/bin/env bash
# Pretrains the published ProteinLM model of 200 million parameters (16 layers x 1024, 16 heads), on one machine with 8
# GPUs.
#
#     DATA_PATH=pfam_text_document bash examples/pretrain_proteinlm_200m.sh [any flag of pretrain_tape.py]
#
# You can set every variable of examples/pretrain_tape_distributed.sh here too. The layout:
#
#     The model fits on each GPU, so the GPUs only split the rows (data parallelism). 200 million parameters in fp32,
#     with gradients and Adam's two moments, take 3.2 GB; --data-parallel-sharding optimizer keeps an eighth of the
#     moments on each GPU, without additional communication.
#     The global batch is that of the original, 4 rows on each of 4 x 8 GPUs, because the learning rate was chosen for
#     it. Here each GPU takes 4 x 4 rows a step. With another number of GPUs, the run is the same.
set -euo pipefail

export PRESET=proteinlm-200m
exec bash "$(dirname "${BASH_SOURCE[0]}")/pretrain_tape_distributed.sh" \
    --data-parallel-sharding optimizer --global-batch-size 128 "$@"
