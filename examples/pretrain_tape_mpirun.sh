#!/usr/bin/env bash
# Pretrains as examples/pretrain_tape.sh does (PRESET, DATA_PATH, CHECKPOINT_PATH and VOCAB_FILE are explained there),
# over processes that mpirun starts, that of Open MPI, MPICH or Intel MPI. They talk as ever, by NCCL or gloo, not by
# MPI. Its checkpoints go to runs/PRESET-mpirun.
#
#     bash examples/pretrain_tape_mpirun.sh [any flag of pretrain_tape.py]
#
# On several machines, which must all see the checkout and CHECKPOINT_PATH (--host as Open MPI has it):
#
#     PROCESSES=16 MPIRUN_FLAGS="--host node0:8,node1:8" MASTER_ADDR=node0 bash examples/pretrain_tape_mpirun.sh
#
#     PROCESSES      processes in all (default: this machine's GPUs; 2 if it has none, on the CPU over gloo)
#     MPIRUN_FLAGS   further flags of mpirun, such as where to run (default: on this machine)
#     MASTER_ADDR    address of the machine of process 0 (default: this machine)
#     MASTER_PORT    a free port there (default: one by the job's name)
#
# A request to stop (Ctrl-C, SIGTERM, SIGHUP, SIGUSR1) to this script reaches all processes: they save, and all end with
# success. Open MPI's mpirun itself, asked by SIGTERM or SIGINT, kills them unsaved.
#
# A process that dies ends all. mpirun does not start them again: run this again to go on from the last checkpoint.
set -euo pipefail

run_suffix=-mpirun
numbers=(PROCESSES:1:99999 MASTER_PORT:1:65535)
source "$(dirname "${BASH_SOURCE[0]}")/pretraining.sh"

processes=${PROCESSES:-$default_processes}
share_cores "$processes"

read -ra mpirun_flags <<<"${MPIRUN_FLAGS-}"
# Each MPI has a flag of its own for the environment of distant processes; `env` is the same for all. Unbound: a process
# needs cores for its threads and for the workers that prepare its batches.
environment=(PYTHONPATH="$PYTHONPATH" OMP_NUM_THREADS="$OMP_NUM_THREADS" GOMP_SPINCOUNT="$GOMP_SPINCOUNT"
    GLIBC_TUNABLES="$GLIBC_TUNABLES"
    ${MASTER_ADDR:+"MASTER_ADDR=$MASTER_ADDR"} ${MASTER_PORT:+"MASTER_PORT=$MASTER_PORT"})
# On SIGTERM Open MPI kills its processes at once. SIGUSR1 every mpirun passes on, and it asks them to stop as well.
run_until_asked USR1 mpirun -np "$processes" --bind-to none ${mpirun_flags[@]+"${mpirun_flags[@]}"} \
    env "${environment[@]}" "$python" "$root/pretrain_tape.py" "${flags[@]}" "$@"
