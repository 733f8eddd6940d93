# What all scripts share. To be sourced; refuses wrong `numbers`, runs setup.sh and sets `num_gpus`. Gives the functions
# `share_cores` and `run_until_asked`. What a script may set before:
#
#     numbers       variables that must be whole numbers where they are set, with the least and the most (a sum may
#                   have variables from further ahead): (NNODES:1:99 NODE_RANK:0:"${NNODES-1}-1")
# shellcheck shell=bash disable=SC2034,SC2154  # variables come from setup.sh and go to the script that sources this

# check_numbers NAME:LEAST:MOST…: refuses a variable that is set, but not to a whole number between these.
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

# share_cores PROCESSES: sets OMP_NUM_THREADS for so many processes on this machine, unless it is set.
share_cores() {
    if [ "$num_gpus" -eq 0 ] && [ -z "${OMP_NUM_THREADS-}" ]; then
        # Left alone, each process would take all cores, and they would hinder each other.
        OMP_NUM_THREADS=$("$python" -c 'import os, sys; print(max(1, len(os.sched_getaffinity(0)) // int(sys.argv[1])))' \
            "$1")
    fi
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
}

# run_until_asked SIGNAL COMMAND…: runs it and returns as it does; a request to stop goes to it, and to it alone, as SIGNAL,
# and leaves its own name in `asked`. One that it dies of came before it could listen, when there is nothing to save.
run_until_asked() {
    local signal=$1 signalled=yes status request
    asked=''
    shift
    for request in TERM INT HUP USR1; do
        # shellcheck disable=SC2064  # the name of each is to be known now
        trap "asked=$request"' signalled=yes; kill -s "$signal" "${!:-}" 2>/dev/null || true' "$request"
    done
    set -m  # its own process group: Ctrl-C at a terminal interrupts the whole group
    "$@" </dev/null &
    set +m
    if [ -n "$asked" ]; then kill -s "$signal" $! || true; fi  # since before it was started
    while [ -n "$signalled" ]; do  # a signal interrupts `wait`
        signalled='' status=0
        wait $! || status=$?
    done
    if [ -n "$asked" ] && [ "$status" -eq $((128 + $(kill -l "$signal"))) ]; then status=0; fi
    return "$status"
}

# A request to stop that comes before the training has started ends with success: there is nothing to save.
trap 'exit 0' TERM INT HUP USR1
check_numbers OMP_NUM_THREADS:1:9999 ${numbers[@]+"${numbers[@]}"}
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" run

num_gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
