#!/usr/bin/env bash
# Pretrains as examples/pretrain_tape.sh does (PRESET, DATA_PATH, CHECKPOINT_PATH and VOCAB_FILE are explained there),
# over several processes that share each batch: data parallel. Its checkpoints go to runs/PRESET-distributed.
#
#     bash examples/pretrain_tape_distributed.sh [any flag of pretrain_tape.py]
#
# A model too large for one GPU is split over neighbouring processes, which then see the same rows (tensor parallel):
#
#     --tensor-model-parallel-size 2    each layer over 2 of them; a divisor of the number of heads, on one machine
#     --sequence-parallel               with it: less memory, as much communication
#
# On several machines, run it on each with the same MASTER_ADDR and with its own NODE_RANK:
#
#     NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 bash examples/pretrain_tape_distributed.sh        (the other: NODE_RANK=1)
#
#     GPUS_PER_NODE   processes on this machine (default: its GPUs; 2 if it has none, on the CPU over gloo)
#     NNODES          machines (default: 1)
#     NODE_RANK       this machine's number, from 0 (default: 0)
#     MASTER_ADDR     address of machine 0 (default: localhost)
#     MASTER_PORT     a free port there (default: 6000; with one machine, any that is free)
#     MAX_RESTARTS    how often to start again from the last checkpoint when a process has died (default: 0)
#
# A process that dies ends all, on all machines, with one line that says which, where and why; one that hangs does so
# within --distributed-timeout-minutes (default: 10).
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" run
run_suffix=-distributed
source "$root/examples/pretraining.sh"

if [ "$num_gpus" -gt 0 ]; then default_processes=$num_gpus; else default_processes=2; fi
processes=${GPUS_PER_NODE:-$default_processes}
share_cores "$processes"

if [ "${NNODES:-1}" -eq 1 ] && [ -z "${MASTER_PORT-}" ]; then
    meeting=(--standalone)
else
    meeting=(--nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" --master_addr "${MASTER_ADDR:-localhost}"
        --master_port "${MASTER_PORT:-6000}")
fi

# A request to stop (Ctrl-C, SIGTERM) goes to the processes that train: they save and end with success, and the launcher
# after them. The launcher itself would give them 30 seconds and then call it a failure.
"$python" -m megatron.parallel.launch.agent "${meeting[@]}" --nproc_per_node "$processes" \
    --max_restarts "${MAX_RESTARTS:-0}" --signals-to-handle SIGHUP,SIGQUIT "$root/pretrain_tape.py" "${flags[@]}" "$@" &
launcher=$!
signalled=yes
trap 'signalled=yes; pkill -TERM -P "$launcher" || true' INT TERM
while [ -n "$signalled" ]; do
    signalled='' status=0
    wait "$launcher" || status=$?
done
exit "$status"
