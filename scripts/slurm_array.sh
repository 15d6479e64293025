#!/usr/bin/env bash
#SBATCH --job-name=ntkgen
#SBATCH --array=1-8
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@60
#SBATCH --requeue
# One kernel by a job array, without dask: each job computes a part of the tiles, and the last one finishes the kernel.
# The first to arrive trains the network and computes the diagonal, for which the others wait. A job that is preempted
# or runs out of time loses the tile in flight; submit the array again for what is missing.
#
#     sbatch --array=1-32 scripts/slurm_array.sh --models resnet18 --dataset cifar --out /shared/runs
set -euo pipefail

: "${SLURM_ARRAY_TASK_ID:?is set by sbatch --array; submit this script with sbatch}"
part=$(((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN) / ${SLURM_ARRAY_TASK_STEP:-1} + 1))

# exec, so that the signal that announces the end reaches uv, which passes it on, and not this shell
exec uv run ntkgen compute --part "$part/$SLURM_ARRAY_TASK_COUNT" --quiet "$@"
