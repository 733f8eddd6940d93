# What all scripts share. Source it: it checks `numbers`, runs setup.sh, sets `num_gpus`, and defines the functions
# `share_cores` and `run_until_asked`. A script may first set:
#
#     numbers       variables that must be whole numbers if they are set, each with its minimum and maximum; a maximum
#                   may be an expression of variables checked before it: (NNODES:1:99 NODE_RANK:0:"${NNODES-1}-1")
#     asked_early   the commands that USR1 runs before the training has started, in place of `exit 0`
# shellcheck shell=bash disable=SC2034,SC2154  # setup.sh sets variables; the sourcing script reads them

# check_numbers NAME:LEAST:MOST…: refuses a variable that is set to anything but a whole number from LEAST to MOST.
check_numbers() {
    local limits name least most
    for limits; do
        IFS=: read -r name least most <<<"$limits"
        most=$((10#$most))
        if [ -n "${!name+set}" ] &&
            ! { [[ ${!name} =~ ^[0-9]{1,9}$ ]] && [ "${!name}" -ge "$least" ] && [ "${!name}" -le "$most" ]; }; then
            echo "error: $name is '${!name}'; set it to a whole number from $least to $most, or unset it" >&2
            exit 2
        fi
    done
}

# share_cores PROCESSES: sets OMP_NUM_THREADS for this number of processes on this machine, unless it is set.
share_cores() {
    if [ "$num_gpus" -eq 0 ] && [ -z "${OMP_NUM_THREADS-}" ]; then
        # Otherwise each process would use all cores, and they would slow each other down.
        OMP_NUM_THREADS=$(tell 'import os, sys; print(max(1, len(os.sched_getaffinity(0)) // int(sys.argv[1])))' "$1")
    fi
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
}

# run_until_asked SIGNAL COMMAND…: runs the command and returns its status. A request to stop (TERM, INT, HUP, USR1)
# goes to this command alone, as SIGNAL; its name is left in `asked`. If the command dies of SIGNAL, it was not yet
# listening, and had nothing to save: this counts as success. (MPICH's mpiexec returns a signal's number without 128.)
run_until_asked() {
    local signal=$1 signalled=yes status request
    asked=''
    shift
    for request in TERM INT HUP USR1; do
        # shellcheck disable=SC2064  # each trap contains the name of its own signal
        trap "asked=$request"' signalled=yes; kill -s "$signal" "${!:-}" 2>/dev/null || true' "$request"
    done
    set -m  # a process group of its own, because Ctrl-C at a terminal interrupts a whole group
    "$@" </dev/null &
    set +m
    if [ -n "$asked" ]; then kill -s "$signal" $! || true; fi  # asked before the command started
    while [ -n "$signalled" ]; do  # a signal interrupts `wait`
        signalled='' status=0
        wait $! || status=$?
    done
    if [ -n "$asked" ] && [ $((status % 128)) -eq "$(kill -l "$signal")" ]; then status=0; fi
    return "$status"
}

# A request to stop before the training has started ends the script with success: there is nothing to save.
trap 'exit 0' TERM INT HUP
# shellcheck disable=SC2064  # the commands are known already
trap "${asked_early:-exit 0}" USR1
check_numbers OMP_NUM_THREADS:1:9999 ${numbers[@]+"${numbers[@]}"}
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" run

num_gpus=$(tell 'import torch; print(torch.cuda.device_count())')
