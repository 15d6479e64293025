#!/usr/bin/env bash
# Train the networks of the predecessor of `cl-run` on CIFAR-10, two classes per task, and print a table of their
# accuracies and kernels beside the published ones (Liu et al. 2025, arXiv:2507.16039, and its public notebooks).
#
#     scripts/reproduce_reactivation.sh [FOLDER]      # default: runs/reactivation
#
# Without a GPU it takes about an hour and a half on two cores: half an hour without the convolutional network. It may be
# interrupted at any time; the same command continues. THREADS sets the threads of each run.
# RUNS selects lines of the list below, for example RUNS="mlp-100 ntk-rnn-100".
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/reactivation}
export OMP_NUM_THREADS=${THREADS:-2}

run() {
    local name=$1 model=$2 width=$3 seeds=$4
    shift 4
    if [[ -n ${RUNS:-} && " $RUNS " != *" $name "* ]]; then return; fi
    # shellcheck disable=SC2086 - the seeds are several arguments
    uv run ntkgen cl-run --preset eth-cifar10 --compat published --model "$model" --width "$width" \
        --seeds $seeds --out "$out/$name" "$@"
}

run mlp-100 mlp 100 "0 1 2"
run ntk-rnn-100 ntk-rnn 100 "0 1 2"
run mlp-500 mlp 500 "0 1 2"
run ntk-rnn-1000 ntk-rnn 1000 "0 1 2"
run mlp-1000 mlp 1000 "0 1 2"
run cnn-1000 cnn 1000 0
run cnn-1000-replay cnn 1000 0 --method replay-mixed --replay 2000

uv run python scripts/reactivation_table.py "$out"
