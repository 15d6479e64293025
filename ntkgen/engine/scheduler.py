"""The scheduler of jobs: it assigns jobs to workers, repeats failed jobs, and decides when a run has failed.

The scheduler accesses neither the cluster nor the clock. Its caller passes the available workers, the results of their
jobs, and the time in seconds.
"""

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from ntkgen.engine.jobs import Job
from ntkgen.errors import WorkerError

# Minimum time in seconds, and minimum ratio to the expected duration, after which a job counts as stalled. The expected
# duration follows from the slowest tile so far or from the projection, whichever is longer.
STALLED_SECONDS, STALLED_RATIO = 900.0, 20.0
# Maximum attempts per job if its workers end or stall.
MAX_ATTEMPTS = 10
# Maximum attempts per job if it raises an error.
MAX_ERRORS = 3
# Maximum time without any local worker, and time between two attempts to start missing ones, in seconds.
NO_WORKER_SECONDS, RESTART_SECONDS = 60, 10


@dataclass(frozen=True)
class SchedulerSettings:
    """Settings that determine how long the scheduler waits.

    Attributes:
        num_own: Number of local workers, which are started again when they end. It is 0 for a running cluster.
        projected_seconds: Projected duration of a tile.
        tile_seconds: Time in seconds after which a tile counts as stalled. None derives it from the tiles so far.
    """

    num_own: int = 0
    projected_seconds: float = 0.0
    tile_seconds: float | None = None


@dataclass(frozen=True)
class WaitingJob:
    """A job that waits for a worker, and its numbers of failed attempts."""

    job: Job
    losses: int = 0  # attempts that ended with their worker
    errors: int = 0  # attempts that raised an error


@dataclass(frozen=True)
class PendingJob:
    """A job that a worker is doing."""

    attempt: WaitingJob
    worker: str
    since: float

    @property
    def job(self) -> Job:
        """The job itself."""
        return self.attempt.job


@dataclass(frozen=True)
class Withdrawal:
    """A job taken from its worker, because the worker has disconnected, or has stalled and must be restarted."""

    worker: str
    has_stalled: bool


class Scheduler:
    """Waiting and pending jobs. Each worker has at most one job, because jobs queued at a worker are lost with it."""

    def __init__(self, jobs: Iterable[Job], settings: SchedulerSettings, now: float) -> None:
        self.pending: dict[str, PendingJob] = {}  # by the address of the worker
        self._waiting = deque(WaitingJob(job) for job in jobs)
        self._settings = settings
        self._available: set[str] = set()
        self._stalled: set[str] = set()  # workers that get no more jobs
        self._slowest = settings.projected_seconds  # duration of the slowest tile
        self._seen = self._restarted = now

    @property
    def is_finished(self) -> bool:
        """Whether all jobs are done."""
        return not self._waiting and not self.pending

    def observe(self, workers: Collection[str], now: float) -> bool:
        """Store the available workers.

        Returns:
            Whether local workers are missing and must be started again.

        Raises:
            WorkerError: If no local worker was available for too long. Workers of a running cluster have no limit,
                because they can wait in a queue for hours.
        """
        self._available = set(workers) - self._stalled
        if self._available:
            self._seen = now
        num_own = self._settings.num_own
        if num_own and now - self._seen > NO_WORKER_SECONDS:
            raise WorkerError(
                f"None of the {num_own} workers is left: expected dask to start them again, and waited "
                f"{NO_WORKER_SECONDS} seconds. Were they killed because they used too much memory? Give less "
                "`memory_bytes` or fewer `workers`, and run the same command again. Finished tiles are kept."
            )
        is_due = len(self._available) < num_own and now - self._restarted > RESTART_SECONDS
        if is_due:
            self._restarted = now
        return is_due

    def assign(self, now: float) -> list[PendingJob]:
        """Give a waiting job to each idle worker."""
        idle = sorted(self._available - self.pending.keys())[: len(self._waiting)]
        assigned = [PendingJob(self._waiting.popleft(), worker, now) for worker in idle]
        self.pending |= {pending.worker: pending for pending in assigned}
        return assigned

    def finish(self, worker: str, seconds: float) -> int:
        """Remove a finished job.

        Returns:
            The number of its blocks or tiles.
        """
        size = self.pending.pop(worker).job.size
        self._slowest = max(self._slowest, seconds / size)
        return size

    def lose(self, worker: str) -> None:
        """Return the job of a worker that ended or stalled to the front of the queue.

        Raises:
            WorkerError: If the job was lost `MAX_ATTEMPTS` times.
        """
        attempt = self.pending.pop(worker).attempt
        losses = attempt.losses + 1
        if losses >= MAX_ATTEMPTS:
            raise WorkerError(
                f"A job of {attempt.job.size} tiles was lost or stalled {losses} times: expected a worker to finish "
                "it. Are the workers killed because they use too much memory, or are the tiles slow? Give less "
                "`memory_bytes`, a smaller `tile_side` or more `tile_seconds`. Finished tiles are kept."
            )
        self._waiting.appendleft(replace(attempt, losses=losses))

    def fail(self, worker: str, error: BaseException) -> None:
        """Return a job that raised an error to the front of the queue.

        Raises:
            WorkerError: If the job failed `MAX_ERRORS` times.
        """
        attempt = self.pending.pop(worker).attempt
        errors = attempt.errors + 1
        if errors >= MAX_ERRORS:
            raise WorkerError(
                f"A job of {attempt.job.size} tiles failed {errors} times ({type(error).__name__}: {error}): expected "
                "tiles, found this error. Is a file missing on the machine of a worker, or its memory or disk too "
                "small? Read the worker's log, and run the same command again. Finished tiles are kept."
            ) from error
        self._waiting.appendleft(replace(attempt, errors=errors))

    def withdraw(self, now: float) -> list[Withdrawal]:
        """Take the jobs from workers that have disconnected or stalled. A stalled worker gets no more jobs.

        Raises:
            WorkerError: If one of the jobs was lost `MAX_ATTEMPTS` times.
        """
        withdrawn = []
        for worker, pending in list(self.pending.items()):
            is_available = worker in self._available
            if is_available and now - pending.since <= self._limit(pending.job):
                continue
            self.lose(worker)
            if is_available:
                self._stalled.add(worker)
            withdrawn.append(Withdrawal(worker, has_stalled=is_available))
        return withdrawn

    def _limit(self, job: Job) -> float:
        """Return the time in seconds after which a job counts as stalled."""
        if self._settings.tile_seconds is not None:
            return self._settings.tile_seconds * job.size
        return max(STALLED_SECONDS, STALLED_RATIO * self._slowest * job.size)
