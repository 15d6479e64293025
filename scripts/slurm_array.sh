#!/usr/bin/env bash
#SBATCH --job-name=ntkgen
#SBATCH --array=1-8
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@60
#SBATCH --requeue
# Compute one kernel by a job array, without dask. Each job computes a part of the tiles, and the last job finishes the
# kernel. The first job that starts trains the network and computes the diagonal. The other jobs wait for this. A job
# that is preempted or runs out of time loses its current tile. Submit the array again to compute the missing tiles.
#
#     sbatch --array=1-32 scripts/slurm_array.sh --models resnet18 --dataset cifar --out /shared/runs
set -euo pipefail

: "${SLURM_ARRAY_TASK_ID:?is not set. Submit this script with sbatch --array}"
part=$(((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN) / ${SLURM_ARRAY_TASK_STEP:-1} + 1))

# exec replaces this shell by uv, so that uv receives SIGTERM before the end of the job and passes it on to ntkgen.
exec uv run ntkgen compute --part "$part/$SLURM_ARRAY_TASK_COUNT" --quiet "$@"
