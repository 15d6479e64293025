"""Data that coordinator and workers exchange: jobs, their outcomes, and the assignment of a run.

The module also divides the missing work into jobs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from ntkgen.plan.order import Band
from ntkgen.plan.plan import Plan

if TYPE_CHECKING:
    from torch import nn

    from ntkgen.files.folder import Folder
    from ntkgen.inputs import Inputs

# Environment variable with the number of threads of a worker. Without it a worker takes its share of the processors.
THREADS = "NTKGEN_THREADS"

# Function that loads the network and its samples on a worker.
Loader: TypeAlias = "Callable[[], tuple[nn.Module, Inputs]]"

# Minimum number of jobs per worker in a large run, and maximum number of tiles per job.
JOBS_PER_WORKER, TILES_PER_JOB = 8, 64
# Maximum projected duration of a job, in seconds.
JOB_SECONDS = 300.0

NO_TILES = Band((), ())


@dataclass(frozen=True)
class Job:
    """One unit of work of a worker: blocks of the diagonal, or tiles of one band."""

    indices: tuple[int, ...] = ()
    band: Band = NO_TILES

    @property
    def size(self) -> int:
        """Number of blocks or tiles."""
        return len(self.indices) + len(self.band.tiles)


@dataclass(frozen=True)
class Outcome:
    """The duration of a job, and the error that ended it, if every other worker would get the same error."""

    seconds: float
    error: Exception | None = None


@dataclass(frozen=True)
class Assignment:
    """The data that every worker of a run gets: the store, the loader of network and samples, and its limits."""

    folder: "Folder"
    load: Loader
    device: str
    is_local: bool
    cached_blocks: int


@dataclass(frozen=True)
class WorkerLimits:
    """The device and the memory of a worker on a machine that ``sharers`` workers share."""

    device: str
    memory_bytes: int | None
    sharers: int


@dataclass(frozen=True)
class InlineLoader:
    """Sends the network and its samples to the workers, so that they load no files."""

    model: "nn.Module"
    inputs: "Inputs"

    def __call__(self) -> "tuple[nn.Module, Inputs]":
        """Return the network and the samples."""
        return self.model, self.inputs


def seconds_at_planned_rate(plan: Plan, flops: int) -> float:
    """Project the duration of ``flops`` operations from the rate of the plan's matrix products."""
    return flops / 2 / (plan.jacobian.rates.product * 1e6)  # the rate is in millions of multiply-adds per second


def job_size(number: int, num_workers: int, tile_seconds: float) -> int:
    """Choose the number of tiles of a job. Each worker gets several jobs, and each job takes a few minutes at most.

    >>> job_size(1000, 2, 0.1), job_size(1000, 2, 60.0), job_size(3, 2, 0.1)
    (62, 5, 1)
    """
    in_time = int(JOB_SECONDS / tile_seconds) if tile_seconds else TILES_PER_JOB
    return max(1, min(TILES_PER_JOB, number // (JOBS_PER_WORKER * num_workers), in_time))


def diagonal_jobs(indices: Sequence[int], size: int) -> Iterator[Job]:
    """Divide the blocks of the diagonal into jobs.

    >>> [job.indices for job in diagonal_jobs(range(5), 2)]
    [(0, 1), (2, 3), (4,)]
    """
    return (Job(indices=tuple(indices[at : at + size])) for at in range(0, len(indices), size))


def tile_jobs(bands: Iterable[Band], size: int) -> Iterator[Job]:
    """Divide bands of tiles into jobs."""
    for band in bands:
        for at in range(0, len(band.tiles), size):
            yield Job(band=Band(band.held, band.tiles[at : at + size]))
