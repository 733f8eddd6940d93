#!/usr/bin/env bash
# Pretrains as examples/pretrain_tape.sh does (PRESET, DATA_PATH, CHECKPOINT_PATH and VOCAB_FILE are explained there),
# in processes that the mpiexec (mpirun) of Open MPI, MPICH or Intel MPI starts. They communicate by NCCL or gloo, as
# elsewhere, not by MPI. It saves checkpoints in runs/PRESET-mpirun.
#
#     bash examples/pretrain_tape_mpirun.sh [any flag of pretrain_tape.py]
#
# On several machines, all of which must see the checkout and CHECKPOINT_PATH (--host in Open MPI's syntax):
#
#     PROCESSES=16 MPIRUN_FLAGS="--host node0:8,node1:8" MASTER_ADDR=node0 bash examples/pretrain_tape_mpirun.sh
#
#     PROCESSES      total number of processes (default: this machine's GPUs; 2 if it has none, on the CPU over gloo)
#     MPIRUN_FLAGS   more flags for mpiexec, such as where to run (default: on this machine)
#     MASTER_ADDR    address of the machine of process 0 (default: this machine; in a job of SLURM, its first)
#     MASTER_PORT    a free port there (default: one chosen at random)
#
# A request to stop (Ctrl-C, SIGTERM, SIGHUP, SIGUSR1) to this script reaches all processes: they save and exit with
# success. Do not send SIGTERM or SIGINT to Open MPI's mpiexec itself: it kills them before they save.
#
# Tried, on one machine, with Open MPI 4.1.4 and 5.0.11, MPICH 5.0.2 and Intel MPI 2021.19; the tests have stand-ins.
#
# When a process dies, all end. mpiexec does not restart them: run this script again to resume from the last checkpoint.
set -euo pipefail

run_suffix=-mpirun
numbers=(PROCESSES:1:99999 MASTER_PORT:1:65535)
source "$(dirname "${BASH_SOURCE[0]}")/pretraining.sh"

processes=${PROCESSES:-$default_processes}
share_cores "$processes"

# MPICH gives its processes no name of the job, from which a port could be derived. Below 32768, from where on Linux
# assigns ports to connections.
port=${MASTER_PORT:-$((10000 + RANDOM % 20000))}
read -ra mpirun_flags <<<"${MPIRUN_FLAGS-}"
# Processes are not bound to cores, because each needs several: for its threads and for the workers that prepare its
# batches. Intel MPI ignores --bind-to none.
export I_MPI_PIN=${I_MPI_PIN:-0}
# Each MPI has its own flag for the environment of remote processes; `env` works with all.
environment=(PYTHONPATH="$PYTHONPATH" OMP_NUM_THREADS="$OMP_NUM_THREADS" GOMP_SPINCOUNT="$GOMP_SPINCOUNT"
    GLIBC_TUNABLES="$GLIBC_TUNABLES" EXIT_STATUS_FILE="$status_file" MASTER_PORT="$port"
    ${MASTER_ADDR:+"MASTER_ADDR=$MASTER_ADDR"})
status=0
# Not mpirun: Intel MPI's is a shell script, and a request to stop would end it alone.
start_ranks mpiexec -np "$processes" --bind-to none ${mpirun_flags[@]+"${mpirun_flags[@]}"} \
    env "${environment[@]}" "$python" "$root/pretrain_tape.py" "${flags[@]}" "$@" || status=$?
# Where a signal has killed a rank, MPICH returns its number alone. No rank ends with one of these itself.
if [ "$status" -gt 4 ] && [ "$status" -le 64 ]; then status=$((128 + status)); fi
exit "$status"
