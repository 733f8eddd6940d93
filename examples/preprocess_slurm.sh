#!/usr/bin/env bash
#SBATCH --job-name=proteinlm-data
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#
# Preprocesses many files of proteins as a SLURM job array. Run it from the checkout; all machines must see the checkout
# and the files:
#
#     bash examples/setup.sh run                                                  once, with Internet access
#     bash examples/preprocess_slurm.sh FILES.txt PREFIX [any flag of tools/preprocess_data.py]
#
# FILES.txt lists one path a line. File number N becomes PREFIX-N_text_document.bin and .idx. When all tasks have
# succeeded, a last job writes PREFIX_text_document.txt, with one line for each file, in the order of FILES.txt.
# Training reads that list as one corpus: `--data-path @PREFIX_text_document.txt`. tools/merge_datasets.py merges the
# files into one.
#
#     TASKS       tasks of the array (default: 1 to the number of files, at most 1,000 tasks, 64 at a time). To repeat
#                 the tasks that failed, fix the cause and run the same command with TASKS=3,7
#
# Set options of sbatch by its variables, such as SBATCH_PARTITION and SBATCH_TIMELIMIT. A task whose machine fails is
# queued again. It restarts its files from the beginning; with --shards, it continues after the last shard.
set -euo pipefail

# What this job does: the first argument. Without it the script submits the jobs, even if called from within a job.
step=submit
if [[ ${1-} == --step=* ]]; then
    step=${1#--step=}
    shift
fi

refuse() {
    echo "error: $*" >&2
    exit 2
}

[ $# -ge 2 ] || refuse "give FILES.txt and PREFIX; the comment at the top of examples/preprocess_slurm.sh explains them"
list=$1 prefix=$2
shift 2
[ -r "$list" ] || refuse "$list cannot be read; give a file that lists one file of proteins a line"
files=()
while read -r file || [ -n "$file" ]; do if [ -n "$file" ]; then files+=("$file"); fi; done <"$list"
[ ${#files[@]} -gt 0 ] || refuse "$list is empty; list one file of proteins a line in it"
num_tasks=$((${#files[@]} < 1000 ? ${#files[@]} : 1000))  # SLURM's default limit is 1,001

# submit: queues the array, and after it the job that writes the list.
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
    echo "queued ${#files[@]} files as $num_tasks tasks of job $job; the lists for --data-path follow them:" \
        "${prefix}_text_document.txt"
}

# preprocess: the files of this task: the one with its number, and every file a multiple of num_tasks after that.
preprocess() {
    local number=$SLURM_ARRAY_TASK_ID
    source "$SLURM_SUBMIT_DIR/examples/setup.sh" run  # SLURM runs a copy of this script, in another folder
    while [ "$number" -le ${#files[@]} ]; do
        "$python" "$root/tools/preprocess_data.py" --input "${files[number - 1]}" --output-prefix "$prefix-$number" \
            --workers "${SLURM_CPUS_PER_TASK:-1}" --overwrite "$@"
        number=$((number + num_tasks))
    done
}

# write_lists: PREFIX_text_document.txt, or one list for each ending of the outputs; each list appears whole.
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
