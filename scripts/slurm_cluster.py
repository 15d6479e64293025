"""Compute kernels on the nodes of a SLURM cluster through dask-jobqueue, with one worker per job.

    pip install dask-jobqueue
    python scripts/slurm_cluster.py --jobs 8 --gpus 1 -- --models resnet18 --dataset cifar --out /shared/runs

The options after the two dashes are those of `ntkgen compute`. This process coordinates the workers. Run it where a
process can run for a long time, such as on a login node or in a small job. It starts one job per worker. Each worker
ends before the time limit of its job, and a new job replaces it.
"""

import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import click


@dataclass(frozen=True)
class Resources:
    """Resources of a job."""

    gpus: int
    cores: int
    memory: str
    walltime: str
    extra: tuple[str, ...] = ()  # options of #SBATCH lines, such as --partition=gpu


def job_settings(asked: Resources) -> dict[str, Any]:
    """Return the arguments of a dask-jobqueue cluster.

    A worker has one dask thread, because torch has threads of its own. It ends five minutes before the time limit of
    its job. The memory limit of dask bounds the memory of a tile.
    """
    lifetime = max(60, _seconds(asked.walltime) - 300)
    directives = [*([f"--gres=gpu:{asked.gpus}"] if asked.gpus else []), *asked.extra]
    worker = ["--nthreads", "1", "--lifetime", f"{lifetime}s", "--lifetime-stagger", "60s"]
    return {
        "cores": 1,
        "processes": 1,
        "job_cpu": asked.cores,
        "memory": asked.memory,
        "walltime": asked.walltime,
        "job_extra_directives": directives,
        "worker_extra_args": [*worker, *(["--resources", "GPU=1"] if asked.gpus else [])],
        "job_script_prologue": [f"export NTKGEN_THREADS={asked.cores}"],
        "scheduler_options": {"dashboard_address": "127.0.0.1:0"},
    }


def _seconds(walltime: str) -> int:
    """Read hours:minutes:seconds.

    >>> _seconds("04:00:00")
    14400
    """
    hours, minutes, seconds = map(int, walltime.split(":"))
    return 3600 * hours + 60 * minutes + seconds


def compute(address: str, options: tuple[str, ...]) -> int:
    """Run `ntkgen compute` on the workers of a scheduler, and return its exit code."""
    command = [sys.executable, "-m", "ntkgen", "compute", "--scheduler", address, *options]
    return subprocess.run(command, check=False).returncode


@click.command()
@click.option(
    "--jobs",
    default=2,
    show_default=True,
    type=click.IntRange(min=1),
    help="Number of workers, which is the number of jobs.",
)
@click.option("--gpus", default=1, show_default=True, type=click.IntRange(min=0), help="Number of GPUs per job.")
@click.option("--cores", default=8, show_default=True, type=click.IntRange(min=1), help="Number of cores per job.")
@click.option("--memory", default="64GB", show_default=True, help="Memory per job.")
@click.option("--walltime", default="04:00:00", show_default=True, help="Time limit per job.")
@click.option(
    "--sbatch", "extra", multiple=True, metavar="OPTION", help="Further option of sbatch, such as --partition=gpu."
)
@click.argument("options", nargs=-1, required=True)
def main(*, jobs: int, options: tuple[str, ...], **asked: Any) -> None:
    """Run `ntkgen compute` with OPTIONS on workers in SLURM jobs."""
    from dask_jobqueue import SLURMCluster  # type: ignore[attr-defined]  # it has no __all__

    with SLURMCluster(**job_settings(Resources(**asked))) as cluster:
        cluster.adapt(minimum_jobs=jobs, maximum_jobs=jobs)  # replaces jobs that end
        sys.exit(compute(cluster.scheduler_address, options))


if __name__ == "__main__":
    main()
