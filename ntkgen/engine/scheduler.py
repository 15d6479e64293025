"""Which worker gets which job, which job is tried again, and when a run is given up.

The scheduler knows neither the cluster nor the clock. Its caller tells it which workers there are, how their jobs ended
and what time it is, in seconds.
"""

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from ntkgen.engine.jobs import Job
from ntkgen.errors import WorkerError

# A job is stalled after STALLED_SECONDS, and after STALLED_RATIO times the duration that the slowest tile so far, or
# the projection, predicts for it.
STALLED_SECONDS, STALLED_RATIO = 900.0, 20.0
# Maximum attempts per job, where workers die or stall.
MAX_ATTEMPTS = 10
# Maximum attempts per job, where it raises an error.
MAX_ERRORS = 3
# Maximum time without a worker of our own, and time between two attempts to start the missing ones.
NO_WORKER_SECONDS, RESTART_SECONDS = 60, 10


@dataclass(frozen=True)
class SchedulerSettings:
    """What decides how long the scheduler waits.

    Attributes:
        num_own: Processes of our own, which are started again when they die; 0 for the workers of a running cluster.
        projected_seconds: The projected duration of a tile.
        tile_seconds: The time after which a tile counts as stalled; None derives it from the tiles so far.
    """

    num_own: int = 0
    projected_seconds: float = 0.0
    tile_seconds: float | None = None


@dataclass(frozen=True)
class WaitingJob:
    """A job that no worker has, and how often it was begun in vain."""

    job: Job
    losses: int = 0  # attempts that ended with their worker
    errors: int = 0  # attempts that raised an error


@dataclass(frozen=True)
class PendingJob:
    """A job that a worker has."""

    attempt: WaitingJob
    worker: str
    since: float

    @property
    def job(self) -> Job:
        """What the worker does."""
        return self.attempt.job


@dataclass(frozen=True)
class Withdrawal:
    """A job that was taken from its worker: the worker has gone, or it has stalled and is to be restarted."""

    worker: str
    has_stalled: bool


class Scheduler:
    """Jobs, waiting and pending. Each worker has one job at a time: a job queued at a worker would be lost with it."""

    def __init__(self, jobs: Iterable[Job], settings: SchedulerSettings, now: float) -> None:
        self.pending: dict[str, PendingJob] = {}  # by worker
        self._waiting = deque(WaitingJob(job) for job in jobs)
        self._settings = settings
        self._available: set[str] = set()
        self._stalled: set[str] = set()  # workers that get no job any more
        self._slowest = settings.projected_seconds  # seconds of a tile
        self._seen = self._restarted = now

    @property
    def is_finished(self) -> bool:
        """Whether every job is done."""
        return not self._waiting and not self.pending

    def observe(self, workers: Collection[str], now: float) -> bool:
        """Take note of the workers that there are.

        Returns:
            Whether workers of our own are missing and are to be started again.

        Raises:
            WorkerError: If none of our own was there for too long. Those of a queue may take hours.
        """
        self._available = set(workers) - self._stalled
        if self._available:
            self._seen = now
        num_own = self._settings.num_own
        if num_own and now - self._seen > NO_WORKER_SECONDS:
            raise WorkerError(
                f"None of the {num_own} workers is left: expected dask to start them again, waited "
                f"{NO_WORKER_SECONDS} seconds. Were they killed for their memory? Give less `memory_bytes` or "
                "fewer `workers`, and run the same command again. What is finished is kept."
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
        """Take note of a finished job.

        Returns:
            Its tiles.
        """
        size = self.pending.pop(worker).job.size
        self._slowest = max(self._slowest, seconds / size)
        return size

    def lose(self, worker: str) -> None:
        """Put the job of a worker that died or stalled first in the queue.

        Raises:
            WorkerError: If it was begun often enough.
        """
        attempt = self.pending.pop(worker).attempt
        losses = attempt.losses + 1
        if losses >= MAX_ATTEMPTS:
            raise WorkerError(
                f"A job of {attempt.job.size} tiles was lost or stalled {losses} times, each time with its worker: "
                "expected one of them to finish it. Are they killed for their memory, or for their time? Give less "
                "`memory_bytes`, a smaller `tile_side` or more `tile_seconds`. What is finished is kept."
            )
        self._waiting.appendleft(replace(attempt, losses=losses))

    def fail(self, worker: str, error: BaseException) -> None:
        """Put a job that raised an error first in the queue.

        Raises:
            WorkerError: If it failed often enough.
        """
        attempt = self.pending.pop(worker).attempt
        errors = attempt.errors + 1
        if errors >= MAX_ERRORS:
            raise WorkerError(
                f"A job of {attempt.job.size} tiles failed {errors} times ({type(error).__name__}: {error}): expected "
                "tiles, found this error. Is something missing on the machine of a worker, or too small? The worker's "
                "log says more. What is finished is kept."
            ) from error
        self._waiting.appendleft(replace(attempt, errors=errors))

    def withdraw(self, now: float) -> list[Withdrawal]:
        """Take the jobs from workers that have gone or stalled. A worker that has stalled gets no job any more.

        Raises:
            WorkerError: If one of the jobs was begun often enough.
        """
        withdrawn = []
        for worker, pending in list(self.pending.items()):
            is_there = worker in self._available
            if is_there and now - pending.since <= self._limit(pending.job):
                continue
            self.lose(worker)
            if is_there:
                self._stalled.add(worker)
            withdrawn.append(Withdrawal(worker, has_stalled=is_there))
        return withdrawn

    def _limit(self, job: Job) -> float:
        """Choose the seconds after which a job is stalled."""
        if self._settings.tile_seconds is not None:
            return self._settings.tile_seconds * job.size
        return max(STALLED_SECONDS, STALLED_RATIO * self._slowest * job.size)
