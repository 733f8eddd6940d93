#!/usr/bin/env bash
# Pretrains a protein language model: sets up, preprocesses proteins, trains, evaluates, and says where everything is.
#
#     bash examples/pretrain_tape.sh [any flag of pretrain_tape.py]
#
# You can stop it with Ctrl-C, or with SIGTERM, on which it saves. Run it again to resume from its last checkpoint.
# You can set these variables, as in `PRESET=tape bash examples/pretrain_tape.sh --train-iters 100`:
#
#     PRESET            demo            4 layers x 128, minutes on a machine without a GPU (the default there)
#                       tape            12 layers x 768, 12 heads (the default with a GPU)
#                       proteinlm-200m  16 layers x 1024, 16 heads
#                       proteinlm-3b    36 layers x 2560, 40 heads
#                       esm2-8m, -35m, -150m, -650m, -3b, -15b, esm1b, protbert
#                       recipe-8m, -35m, -150m, -650m (demo's recipe at larger scale; not measured)
#     DATA_PATH         prefix of PREFIX.bin and PREFIX.idx, as tools/preprocess_data.py writes them; several prefixes,
#                       or @FILE with one a line, as one corpus; or each after its weight: "0.7 pfam 0.3 uniref"
#                       (default: the proteins in examples/proteins)
#     CHECKPOINT_PATH   folder for checkpoints, logs, curves (default: runs/PRESET in the checkout; with --config FILE
#                       among the flags, runs/FILE unless the file names a folder, and no preset unless PRESET is set)
#     VOCAB_FILE        iupac, esm, protbert, or a file with one token a line (default: the preset's)
#
# A preset sets the model and the hyperparameters (megatron/config/presets/); any flag overrides it. The tape and
# proteinlm presets have the published hyperparameters:
#
#     --seq-length 2176 --micro-batch-size 4 --train-iters 1000000 --weight-decay 0.01 --clip-grad 1.0
#     --lr 1e-4 --min-lr 1e-5 --lr-decay-style linear --lr-decay-iters 990000 --lr-warmup-fraction 0.01
#     --attention-dropout 0.1 --hidden-dropout 0.1 --layernorm-epsilon 1e-12
#     --log-interval 100 --save-interval 10000 --eval-interval 1000 --eval-iters 10
#
# On TAPE's Pfam corpus, the published split into training, validation and test is --split 32593668,1715454,44311.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/pretraining.sh"

exec "$python" "$root/pretrain_tape.py" "${flags[@]}" "$@"
