#!/usr/bin/env bash
# Compare seven learners with adaptive noise on CIFAR-10 with permuted labels, and print their table.
#
#     scripts/reproduce_upgd.sh [FOLDER]      # default: runs/upgd
#
# Every learner sees the same streams, one per seed, from the same parameters. There are two rounds: one
# with the same step size for all learners, and one with what the published code does, which takes twice the step for
# utilities per kernel. Without a GPU a round took 22 minutes on one core. The script may be interrupted at any time; the same command
# continues. TASKS, SEEDS and ROUNDS change it, for example TASKS=400 SEEDS=0 ROUNDS=equal for the published length.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/upgd}
learners="baseline weight_norm grad_norm ratio_norm usgd entire_kernel column_kernel"

run() { # ROUND LEARNER
    local compat=()
    if [[ $1 == published ]]; then compat=(--compat published); fi
    # shellcheck disable=SC2086 - the seeds are several arguments
    uv run ntkgen cl-run --stream label-permuted --dataset cifar10 --method "$2" --model lenet-stream --lr 0.01 \
        --beta-utility 0.999 --sigma 0.001 --samples "$((${TASKS:-10} * 2500))" --seeds ${SEEDS:-0 1 2 3 4 5 6 7 8 9} \
        --kernels-every "${KERNELS_EVERY:-5}" --probe-per-class 2 "${compat[@]}" --out "$out/$1/$2"
}

for round in ${ROUNDS:-equal published}; do
    for learner in $learners; do run "$round" "$learner"; done
    runs=()
    for learner in $learners; do runs+=("$out/$round/$learner"); done
    uv run ntkgen cl-plot "${runs[@]}" --last 5 --out "$out/plots-$round"
done
uv run python scripts/upgd_table.py "$out"
