#!/usr/bin/env bash
# Pretrains as examples/pretrain_tape.sh does (PRESET, DATA_PATH, CHECKPOINT_PATH and VOCAB_FILE are explained there),
# in several processes that split each batch (data parallelism). It saves checkpoints in runs/PRESET-distributed.
#
#     bash examples/pretrain_tape_distributed.sh [any flag of pretrain_tape.py]
#
# To train a model too large for one GPU, split it over neighbouring processes, which then see the same rows (tensor
# parallelism):
#
#     --tensor-model-parallel-size 2    each layer over 2 processes of one machine; must divide the number of heads
#     --sequence-parallel               in addition: less memory, as much communication
#
# On several machines, run it on each with the same MASTER_ADDR and with its own NODE_RANK:
#
#     NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 bash examples/pretrain_tape_distributed.sh        (the other: NODE_RANK=1)
#
#     GPUS_PER_NODE   processes on this machine (default: its GPUs; 2 if it has none, on the CPU over gloo)
#     NNODES          number of machines (default: 1); LEAST:MOST if it may change, see below
#     NODE_RANK       this machine's number, from 0 (default: 0)
#     MASTER_ADDR     address of machine 0, as the others see it (required if NNODES is above 1)
#     MASTER_PORT     a free port there (default: 6000; with one machine, any free port)
#     MAX_RESTARTS    how often to restart from the last checkpoint when a process has died (default: 0)
#
# When a process dies, all processes on all machines end, with one line that says which died, where and why. When one
# hangs, or a machine does not come, they end within --distributed-timeout-minutes (default: 10). A request to stop
# (Ctrl-C, SIGTERM, SIGHUP, SIGUSR1) on one machine reaches all: all processes save and exit with success.
#
# With NNODES=2:4, training starts once 2 machines have joined and half a minute has passed, and uses as many machines
# as there are, up to 4. A machine that comes later joins from a checkpoint that is saved for it. A lost machine counts
# as a restart (MAX_RESTARTS), and the others resume from the last checkpoint without it. Machine 0 must stay. NODE_RANK
# is not needed. To keep the run the same with any number of machines, give a --global-batch-size that is a multiple of
# the rows that all processes take at once, for each number of processes.
set -euo pipefail

if [[ ${NNODES-} == *:* ]]; then LEAST_NNODES=${NNODES%%:*} NNODES=${NNODES#*:}; fi
run_suffix=-distributed
numbers=(GPUS_PER_NODE:1:999 NNODES:1:99999 LEAST_NNODES:1:"${NNODES-1}" NODE_RANK:0:"${NNODES-1}-1" MASTER_PORT:1:65535
    MAX_RESTARTS:0:999999)
source "$(dirname "${BASH_SOURCE[0]}")/pretraining.sh"

processes=${GPUS_PER_NODE:-$default_processes}
share_cores "$processes"

nodes=${NNODES:-1} node_rank=${NODE_RANK:-0}
if [ -n "${LEAST_NNODES-}" ]; then
    if [ -z "${MASTER_ADDR-}" ]; then fail "NNODES is $LEAST_NNODES:$nodes; set MASTER_ADDR too"; fi
    meeting=(--nnodes "$LEAST_NNODES:$nodes" --rdzv_backend c10d --rdzv_id "${SLURM_JOB_ID:-pretraining}"
        --rdzv_endpoint "$MASTER_ADDR:${MASTER_PORT:-6000}")
elif [ "$nodes" -eq 1 ] && [ -z "${MASTER_PORT-}" ]; then
    meeting=(--standalone)
else
    if [ "$nodes" -gt 1 ] && [ -z "${MASTER_ADDR-}" ]; then fail "NNODES is $nodes; set MASTER_ADDR too"; fi
    meeting=(--nnodes "$nodes" --node_rank "$node_rank" --master_addr "${MASTER_ADDR:-127.0.0.1}"
        --master_port "${MASTER_PORT:-6000}")
fi

run_until_asked TERM "$python" -m megatron.parallel.launch "${meeting[@]}" --nproc_per_node "$processes" \
    --max_restarts "${MAX_RESTARTS:-0}" "$root/pretrain_tape.py" "${flags[@]}" "$@"
