"""The same tiles on a dask cluster: workers compute and commit, the coordinator hands out jobs and writes the rest.

A job is some tiles of one band, or some blocks of the diagonal. A worker loads network and samples once, skips what is
on disk already, commits its tiles with the code of a single process, and returns a few numbers. Each worker has one job
at a time. A job whose worker has died is given to another, one that has stalled too.
"""

import logging
import os
import signal
import socket
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from ntkgen.engine.cluster import CONNECT_SECONDS, WORKER_SECONDS, address_of, connected, shared, wait_for_a_worker
from ntkgen.engine.jobs import (
    THREADS,
    Assignment,
    Job,
    Loader,
    Outcome,
    WorkerLimits,
    diagonal_jobs,
    job_size,
    seconds_at_planned_rate,
    tile_jobs,
)
from ntkgen.engine.machine import Machine
from ntkgen.engine.spawning import require_main_guard, starting_processes, unguarded, without_missing_script
from ntkgen.errors import InputError, WorkerError
from ntkgen.progress import Report, Step, counter, ignore_step
from ntkgen.store.store import KernelStore

if TYPE_CHECKING:
    from distributed import Client, Future, LocalCluster, Nanny, WorkerPlugin

    from ntkgen.plan.plan import Budget

# A job is taken for stalled after so many seconds, or so many times those of the longest so far, or those planned.
STALLED_SECONDS, STALLED_RATIO = 900.0, 20.0
# So often is a job begun again whose worker died or stalled.
MAX_TRIES = 10
# So often is a job tried again on the same worker that has raised an error.
RETRIES = 2
POLL_SECONDS, LOOK_SECONDS, FETCH_SECONDS = 0.5, 0.01, 2.0
REFILL_SECONDS = 10


@dataclass(frozen=True)
class _Flight:
    """A job on its way."""

    job: Job
    tries: int
    worker: str
    since: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Team:
    """The workers of a cluster, and what each of them computes on."""

    client: "Client"
    device: str
    num_own: int = 0  # processes of ours on this machine; 0: the workers are somebody else's
    tile_seconds: float | None = None  # after which a tile is taken for stalled

    def machine(self, precision: str, memory_bytes: int | None) -> Machine:
        """Describe what a worker has; the least memory of all.

        The memory asked for is that of all workers of ours together, and that of each of somebody else's.

        Raises:
            InputError: If there is none.
        """
        self._refill()
        wait_for_a_worker(self.client)
        from ntkgen.engine import worker

        hosts = self._ask(socket.gethostname)
        sharers = self.num_own or max(Counter(hosts.values()).values())
        memory_bytes = memory_bytes // self.num_own if memory_bytes is not None and self.num_own else memory_bytes
        limits = WorkerLimits(self.device, memory_bytes, sharers)
        found = next(iter(self._ask(worker.machine, limits, precision, only_one=True).values()))
        budgets: Iterable[Budget] = self._ask(worker.budget, limits).values()
        least = min(budgets, key=lambda budget: budget.available_bytes)
        return Machine(found.environment, least, found.rates)

    def _ask(self, function: Callable[..., Any], *args: Any, only_one: bool = False) -> dict[str, Any]:
        """Call a function on every worker, or on one; a worker that dies meanwhile does not answer.

        Raises:
            WorkerError: If none answers.
        """
        until, tries = time.monotonic() + WORKER_SECONDS, 0
        while time.monotonic() < until:
            there = sorted(self.workers())
            names = [there[tries % len(there)]] if only_one and there else None
            with suppress(OSError):  # a connection that closes: a worker died just then
                answers: dict[str, Any] = self.client.run(function, *args, workers=names, on_error="ignore")
                if answers:
                    return answers
            time.sleep(POLL_SECONDS)
            tries += 1
        raise WorkerError(
            f"No worker of the cluster at {self.address} answers: expected one at least, asked for {WORKER_SECONDS} "
            "seconds. Do they die as soon as they are started? Their logs say more. What is finished is kept."
        )

    @property
    def address(self) -> str:
        """Where the scheduler is."""
        return address_of(self.client)

    @property
    def dashboard(self) -> str:
        """Where dask shows what its workers do."""
        return str(self.client.dashboard_link)

    def run(self, store: KernelStore, load: Loader, *, cached_blocks: int, report: Report) -> None:
        """Compute and commit what a store is missing, as `run` does in one process."""
        from ntkgen.engine import worker

        assignment = Assignment(shared(store.folder), load, self.device, self.num_own > 0, cached_blocks)
        name = f"ntkgen-{uuid.uuid4().hex}"  # of this run: another may make the same kernel elsewhere
        self._enlist(worker.Hand(assignment), name)
        try:
            self._run(store, name, cached_blocks, report)
        finally:
            self._dismiss(name)
        store.finalize()

    def _enlist(self, hand: "WorkerPlugin", name: str) -> None:
        """Tell all workers, those that are yet to come too, what they have to know.

        Raises:
            WorkerError: If that fails again and again.
        """
        for _ in range(MAX_TRIES):
            with suppress(OSError):  # a worker died just then; dask has noted the plugin before it told them
                self.client.register_plugin(hand, name=name)
                return
            time.sleep(POLL_SECONDS)
        raise WorkerError(
            f"The workers of the cluster at {self.address} could not be told what to do: expected them to stay, tried "
            f"{MAX_TRIES} times. Do they die as soon as they are started? Their logs say more."
        )

    def _dismiss(self, name: str) -> None:
        """Have all workers let go of a run, and forget it."""
        from ntkgen.engine import worker

        with suppress(OSError, ValueError):  # of a worker that died just then the system has taken everything back
            self.client.run(worker.let_go, name, on_error="ignore")
        with suppress(OSError, ValueError):
            self.client.unregister_worker_plugin(name)

    def _run(self, store: KernelStore, name: str, cached_blocks: int, report: Report) -> None:
        plan, missing, total = store.manifest.plan, store.missing_blocks(), store.manifest.plan.num_sides
        pace = seconds_at_planned_rate(plan, plan.projected_flops((), cached_blocks, missing)) / max(1, len(missing))
        jobs = diagonal_jobs(missing, job_size(len(missing), self.num_workers, pace))
        self._finish(name, jobs, counter(report, "diagonal", total - len(missing), total), pace)
        store.create_kernels()
        tiles, total = store.missing_tiles(), plan.grid.num_tiles
        pace = seconds_at_planned_rate(plan, plan.projected_flops(tiles, cached_blocks)) / max(1, len(tiles))
        jobs = tile_jobs(plan.bands(tiles, cached_blocks), job_size(len(tiles), self.num_workers, pace))
        self._finish(name, jobs, counter(report, "tiles", total - len(tiles), total), pace)

    @property
    def num_workers(self) -> int:
        """Count the workers that there are, one at least."""
        return max(1, len(self.workers()))

    def _finish(self, name: str, jobs: Iterable[Job], step: Step = ignore_step, pace: float = 0.0) -> None:
        """Have some jobs done, one at a time by each worker: a job that waits at a worker would share its fate.

        The ``pace`` is the seconds that a tile may take, as far as the plan can tell.
        """
        waiting = deque((job, 1) for job in jobs)
        flying: dict[Future[Outcome], _Flight] = {}
        given_up: set[str] = set()  # workers that stalled
        longest = pace  # seconds of the slowest tile so far
        seen = refilled = time.monotonic()
        try:
            while waiting or flying:
                there = self.workers() - given_up
                seen = time.monotonic() if there else seen
                self._require_workers(time.monotonic() - seen)
                if len(there) < self.num_own and time.monotonic() - refilled > REFILL_SECONDS:
                    self._refill()
                    refilled = time.monotonic()
                for worker in sorted(there - {flight.worker for flight in flying.values()})[: len(waiting)]:
                    job, tries = waiting.popleft()
                    flying[self._submit(name, job, worker)] = _Flight(job, tries, worker)
                for future in self._landed(list(flying)):
                    flight = flying.pop(future)
                    outcome = self._outcome(future, flight.worker)
                    future.release()
                    if outcome is None:
                        waiting.appendleft(_again(flight))
                        continue
                    longest = max(longest, outcome.seconds / flight.job.size)
                    for _ in range(flight.job.size):
                        step()
                for future, flight in list(flying.items()):
                    if flight.worker in there and not self._has_stalled(flight, longest):
                        continue
                    waiting.appendleft(_again(flying.pop(future)))
                    future.cancel(force=True)
                    if flight.worker in there:
                        given_up.add(flight.worker)
                        self._restart(flight.worker)
        finally:
            self.client.cancel(list(flying), force=True)

    def _refill(self) -> None:
        """Start workers of ours anew that dask has given up, as one that died while it was started."""
        if self.num_own and self.client.cluster is not None:
            with suppress(KeyError, OSError, RuntimeError):
                self.client.cluster.scale(self.num_own)

    def _require_workers(self, seconds: float) -> None:
        """Refuse to wait for workers of ours that do not come back; those of a queue may take hours.

        Raises:
            WorkerError: If there were none for too long.
        """
        if self.num_own and seconds > WORKER_SECONDS:
            raise WorkerError(
                f"None of the {self.num_own} workers is left: expected dask to start them again, waited "
                f"{WORKER_SECONDS} seconds. Were they killed for their memory? Give less --memory or fewer --workers, "
                "and run the same command again. What is finished is kept."
            )

    def workers(self) -> set[str]:
        """Name the workers that there are.

        Raises:
            WorkerError: If the scheduler has gone.
        """
        try:
            return set(self.client.nthreads())
        except OSError as error:
            raise WorkerError(
                f"The scheduler of the cluster does not answer ({' '.join(str(error).split())[:100]}): expected it to "
                "stay until the end. Was it stopped, or its machine? Start one, then run the same command again. What "
                "is finished is kept."
            ) from error

    def _submit(self, name: str, job: Job, worker: str) -> "Future[Outcome]":
        from ntkgen.engine.worker import do_job

        gpu = {"GPU": 1} if "GPU" in self._resources(worker) else None
        return self.client.submit(do_job, name, job, workers=[worker], pure=False, retries=RETRIES, resources=gpu)

    def _resources(self, worker: str) -> Mapping[str, float]:
        found: Mapping[str, float] = (
            self.client.scheduler_info(n_workers=-1)["workers"].get(worker, {}).get("resources", {})
        )
        return found

    def _landed(self, futures: "Sequence[Future[Outcome]]") -> "set[Future[Outcome]]":
        """Wait a moment for jobs to end. dask's own `wait` changes the settings of the whole process meanwhile."""
        until = time.monotonic() + POLL_SECONDS
        while not (landed := {future for future in futures if future.done()}) and time.monotonic() < until:
            time.sleep(LOOK_SECONDS)
        return landed

    def _outcome(self, future: "Future[Outcome]", worker: str) -> Outcome | None:
        """Take what a worker has said; None where the job was lost with its worker.

        An outcome stays with its worker until it is fetched. Of one that dies in between the scheduler would wait for
        ever, since no other worker may do the job again.
        """
        while future.status in {"finished", "error"} and worker in self.workers():
            try:
                if future.status == "error":
                    _require_lost(future.exception(timeout=FETCH_SECONDS))
                    return None
                outcome: Outcome = future.result(timeout=FETCH_SECONDS)
            except TimeoutError:
                continue
            except CancelledError:
                return None
            if outcome.error is not None:
                raise outcome.error
            return outcome
        future.cancel(force=True)
        return None

    def _has_stalled(self, flight: _Flight, longest: float) -> bool:
        limit = max(STALLED_SECONDS, STALLED_RATIO * longest * flight.job.size)
        if self.tile_seconds is not None:
            limit = self.tile_seconds * flight.job.size
        return time.monotonic() - flight.since > limit

    def _restart(self, worker: str) -> None:
        """Restart a worker: one of ours by killing it, which is quick; another one by its nanny, if it has one."""
        for nanny in self.nannies:
            if nanny.worker_address == worker and nanny.pid is not None:
                os.kill(nanny.pid, signal.SIGKILL)
                return
        with suppress(ValueError, OSError, TimeoutError):
            self.client.restart_workers([worker], timeout=CONNECT_SECONDS, raise_for_error=False)

    @property
    def nannies(self) -> "list[Nanny]":
        """What watches over the workers that are ours."""
        return list(self.client.cluster.workers.values()) if self.num_own and self.client.cluster is not None else []


def _require_lost(error: BaseException | None) -> None:
    """Take it that a job was lost with its worker, if that is the error.

    Raises:
        WorkerError: If the job has failed otherwise, and will fail again.
    """
    from distributed import KilledWorker

    if error is not None and not isinstance(error, KilledWorker):
        raise WorkerError(
            f"A worker could not do its job, three times ({type(error).__name__}: {error}): expected tiles, found "
            "this. Is something missing on that machine, or too small? Its log says more. What is finished is kept."
        ) from error


def _again(flight: _Flight) -> tuple[Job, int]:
    """Count a job that is to be begun again.

    Raises:
        WorkerError: If it was often enough.
    """
    if flight.tries >= MAX_TRIES:
        raise WorkerError(
            f"A job of {flight.job.size} tiles was lost or stalled {flight.tries} times, each time with its worker: "
            "expected one of them to finish it. Are they killed for their memory, or for their time? Give less "
            "--memory, a smaller --tile or more --tile-timeout. What is finished is kept."
        )
    return flight.job, flight.tries + 1


@contextmanager
def open_team(
    workers: int | None, client: "Client | str | None", device: str, tile_seconds: float | None = None
) -> Iterator[Team | None]:
    """Start some workers on this machine, or find those of a cluster; None where this process is to do the work.

    Args:
        workers: So many processes of our own.
        client: A client of a running cluster, the address of its scheduler, or the scheduler's file.
        device: What each computes on.
        tile_seconds: After which a tile is taken for stalled.

    Raises:
        InputError: If both are given, or there is no such cluster.
    """
    if workers is not None and client is not None:
        raise InputError(
            "Workers of our own and a running cluster were both asked for: expected one of them. Leave out --workers "
            "or --scheduler."
        )
    if workers is None and client is None:
        yield None
        return
    with ExitStack() as held:
        found = client
        if found is None:
            found = held.enter_context(_own_cluster(workers or 0))
        elif isinstance(found, str):
            found = held.enter_context(connected(found))
        yield Team(found, device, workers or 0, tile_seconds)


@contextmanager
def _own_cluster(workers: int) -> "Iterator[Client]":
    """Start processes on this machine, with its threads shared among them; they end with this block or this process.

    Raises:
        InputError: If their number is none, or each of them comes to this call too.
        WorkerError: If they do not start.
    """
    require_main_guard()
    import dask
    from distributed import Client, LocalCluster

    if workers < 1:
        raise InputError(f"--workers {workers} is no number of processes: expected 1 or more. Leave it out for none.")
    threads = max(1, torch.get_num_threads() // workers)
    settings = {"distributed.scheduler.allowed-failures": 0, "distributed.worker.daemon": True}
    environ = {THREADS: str(threads)}
    with dask.config.set(settings), without_missing_script(), ExitStack() as held:
        folder = Path(held.enter_context(TemporaryDirectory(prefix="ntkgen-workers-")))
        (folder / "workers").mkdir()
        with starting_processes(folder) as was_called_again:
            try:
                cluster = LocalCluster(
                    n_workers=workers,
                    threads_per_worker=1,
                    memory_limit=0,
                    resources={"GPU": 1} if torch.cuda.is_available() else None,
                    dashboard_address="127.0.0.1:0",
                    env=environ,
                    preload="ntkgen.engine.worker",
                    local_directory=str(folder / "workers"),
                    silence_logs=logging.CRITICAL,
                )
            except RuntimeError as error:
                if was_called_again():
                    raise InputError(unguarded()) from None
                raise WorkerError(
                    f"The {workers} workers did not start ({error}): expected as many processes. Was one of them "
                    "killed, or is there too little memory for them? Run the same command again, with fewer --workers."
                ) from error
        held.enter_context(_closed_quietly(cluster))
        yield held.enter_context(Client(cluster, set_as_default=False))


@contextmanager
def _closed_quietly(cluster: "LocalCluster") -> "Iterator[LocalCluster]":
    """Close a cluster in the end, of which dask may have lost a worker that died while it was started (KeyError)."""
    try:
        yield cluster
    finally:
        with suppress(KeyError, OSError, TimeoutError):
            cluster.close()
