#!/usr/bin/env bash
# Reproduce the loss of plasticity at a scale that needs no GPU, and print its tables (Dohare et al. 2024, Nature 632).
#
#     scripts/reproduce_plasticity.sh [FOLDER]      # default: runs/plasticity
#
# Two experiments: slowly changing regression, and an incremental CIFAR-100 with few images and a small ResNet. Without
# a GPU they took 189 minutes of CPU time, which is about 95 minutes on two cores. The script may be interrupted at any
# time; the same command continues. DATA is a data set of 100 classes: a name, or an .npz file such as the subset of
# CIFAR-100. SEEDS, EPOCHS and WIDTH change the second experiment. RUNS selects from the list below, for example
# RUNS="slow-regression base".
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/plasticity}
data=${DATA:-${NTKGEN_DATA_DIR:-data}/cifar100-subset.npz}
epochs=${EPOCHS:-40}
images=$out/incremental-cifar100

is_chosen() { [[ -z ${RUNS:-} || " $RUNS " == *" $1 "* ]]; }

if is_chosen slow-regression; then
    uv run ntkgen cl-run --stream slow-regression --seeds 0 1 2 3 4 5 6 7 8 9 --out "$out/slow-regression"
fi

run() {
    if ! is_chosen "$1"; then return; fi
    # The learning rate falls at the published fractions of the epochs. The table is of the validation samples, so no
    # epoch is chosen on them. Kernels of all outputs are those at the boundaries; 100 outputs are dear.
    # shellcheck disable=SC2086 - the seeds are several arguments
    uv run ntkgen cl-run --preset incremental-cifar100 --method "$2" --dataset "$data" --validation-per-class 10 \
        --select last --model resnet10-bias --width "${WIDTH:-8}" --epochs "$epochs" --bs 45 --lr 0.05 \
        --lr-milestones "$((epochs * 3 / 10)),$((epochs * 6 / 10)),$((epochs * 8 / 10))" --normalise symmetric \
        --replacement-rate 1e-4 --maturity 100 --output sum --evaluations task --seeds ${SEEDS:-0 1 2} \
        --workers "${WORKERS:-3}" --out "$images/$1"
    uv run ntkgen cl-analyze "$images/$1" --units > /dev/null # of all samples of a view
    uv run ntkgen cl-analyze "$images/$1" --boundary-kernels --view-samples 10 --view-output seen > /dev/null
}

run base_deep_learning_system base
run continual_backpropagation continual-backprop
run shrink_and_perturb shrink-and-perturb
run head_resetting reset-head
run retrained_network reset-network

uv run ntkgen cl-plot "$out/slow-regression" --out "$out/plots"
uv run ntkgen cl-plot "$images" --baseline retrained_network --out "$out/plots"
uv run python scripts/plasticity_table.py "$out"
