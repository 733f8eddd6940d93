#!/usr/bin/env bash
#SBATCH --job-name=proteinlm-data
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#
# Preprocesses many files of proteins on machines that SLURM gives, as an array of jobs. From the checkout, which all
# machines must see, as they must see the files:
#
#     bash examples/setup.sh run                                                  once, where the Internet is in reach
#     bash examples/preprocess_slurm.sh FILES.txt PREFIX [any flag of tools/preprocess_data.py]
#
# FILES.txt has the path of a file a line. File number N becomes PREFIX-N_text_document.bin and .idx, and a last job,
# once all have ended well, writes PREFIX_text_document.txt with a line for each, in the order of FILES.txt. Training
# takes that list as one corpus, `--data-path @PREFIX_text_document.txt`; tools/merge_datasets.py makes one file of it.
#
#     TASKS       of the array (default: 1 to the number of files, at most 1,000 tasks, 64 at a time). To do those again
#                 that failed, once their cause is mended: TASKS=3,7 and the same command
#
# sbatch's own options go by its variables, such as SBATCH_PARTITION and SBATCH_TIMELIMIT. A task whose machine fails is
# queued again, and begins its files anew, or with --shards goes on behind the last shard.
set -euo pipefail

# What a job of this script does, its first argument; none where it is called to queue them, be it from within a job.
step=submit
if [[ ${1-} == --step=* ]]; then
    step=${1#--step=}
    shift
fi

refuse() {
    echo "error: $*" >&2
    exit 2
}

[ $# -ge 2 ] || refuse "give FILES.txt and PREFIX; the head of examples/preprocess_slurm.sh explains them"
list=$1 prefix=$2
shift 2
[ -r "$list" ] || refuse "$list cannot be read; give a file with the path of a file of proteins a line"
files=()
while read -r file || [ -n "$file" ]; do if [ -n "$file" ]; then files+=("$file"); fi; done <"$list"
[ ${#files[@]} -gt 0 ] || refuse "$list is empty; it has the path of a file of proteins a line"
num_tasks=$((${#files[@]} < 1000 ? ${#files[@]} : 1000))  # SLURM's own limit is 1,001 unless it was raised

# submit: queues the array, and behind it the job that writes the list.
submit() {
    local file job
    for file in "${files[@]}"; do
        [ -r "$file" ] || refuse "$file, which $list names, cannot be read"
    done
    [ -e examples/preprocess_slurm.sh ] || refuse "run this in the checkout: bash examples/preprocess_slurm.sh …"
    mkdir -p "$(dirname "$prefix")"
    job=$(sbatch --parsable --array="${TASKS:-1-$num_tasks%64}" examples/preprocess_slurm.sh --step=preprocess "$list" \
        "$prefix" "$@")
    job=${job%%;*}
    sbatch --parsable --dependency="afterok:$job" --kill-on-invalid-dep=yes --time=10 --cpus-per-task=1 \
        examples/preprocess_slurm.sh --step=write_lists "$list" "$prefix" >/dev/null
    echo "queued ${#files[@]} files as $num_tasks tasks of job $job; the lists for --data-path come behind them:" \
        "${prefix}_text_document.txt"
}

# preprocess: the files of this task, the one of its number and those a whole number of arrays further on.
preprocess() {
    local number=$SLURM_ARRAY_TASK_ID
    source "$SLURM_SUBMIT_DIR/examples/setup.sh" run  # SLURM runs a copy of this script, from a folder of its own
    while [ "$number" -le ${#files[@]} ]; do
        "$python" "$root/tools/preprocess_data.py" --input "${files[number - 1]}" --output-prefix "$prefix-$number" \
            --workers "${SLURM_CPUS_PER_TASK:-1}" --overwrite "$@"
        number=$((number + num_tasks))
    done
}

# write_lists: PREFIX_text_document.txt, or what the outputs' own endings are; whole or not at all.
write_lists() {
    local number index ending endings=()
    for index in "$prefix-1"_*.idx; do
        ending=${index#"$prefix-1"}
        endings+=("${ending%.idx}")
    done
    for ending in "${endings[@]}"; do
        for ((number = 1; number <= ${#files[@]}; number++)); do
            index=$prefix-$number$ending
            [ -e "$index.idx" ] || refuse "$index.idx is missing; TASKS=$(((number - 1) % num_tasks + 1)) makes it"
            echo "${index##*/}"
        done >"$prefix$ending.txt.part"
        mv "$prefix$ending.txt.part" "$prefix$ending.txt"
        echo "wrote $prefix$ending.txt: ${#files[@]} datasets"
    done
}

"$step" "$@"
