"""The coordinator of a run on a dask cluster: it assigns jobs, while the workers compute and commit the tiles.

A job is a set of tiles of one band, or of blocks of the diagonal. A worker loads network and samples once, skips tiles
that are stored already, commits its tiles by the same code as a single process, and returns a few numbers. The
coordinator writes everything else of the store. `ntkgen.engine.scheduler` chooses the worker of each job, and this
module submits the job with dask.
"""

import os
import signal
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ntkgen.engine.cluster import CONNECT_SECONDS, WORKER_SECONDS, address_of, connected, shared, wait_for_a_worker
from ntkgen.engine.jobs import (
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
from ntkgen.engine.own_cluster import own_cluster
from ntkgen.engine.scheduler import Scheduler, SchedulerSettings
from ntkgen.errors import InputError, WorkerError
from ntkgen.plan.order import bands_of, projected_flops
from ntkgen.progress import Report, Step, counter
from ntkgen.store.store import KernelStore

if TYPE_CHECKING:
    from distributed import Client, Future, Nanny, WorkerPlugin

    from ntkgen.plan.plan import Budget


# Maximum attempts to register a run with the workers.
MAX_REGISTRATIONS = 10
# Interval between two checks of the workers, interval between two checks of their jobs, and timeout of a fetch.
POLL_SECONDS, LOOK_SECONDS, FETCH_SECONDS = 0.5, 0.01, 2.0


@dataclass(frozen=True)
class WorkerPool:
    """The workers of a cluster.

    Attributes:
        client: Client of the cluster.
        device: Device of each worker.
        num_own: Number of worker processes that this run has started. It is 0 for the workers of a running cluster.
        tile_seconds: Time in seconds after which a tile counts as stalled.
    """

    client: "Client"
    device: str
    num_own: int = 0
    tile_seconds: float | None = None

    def machine(self, precision: str, memory_bytes: int | None) -> Machine:
        """Describe the machine of a worker, with the smallest memory of all workers.

        Workers that this run has started share the ``memory_bytes``. Each worker of a running cluster may take
        ``memory_bytes``.

        Raises:
            InputError: If there is no worker.
            WorkerError: If no worker answers.
        """
        self._start_missing_workers()
        wait_for_a_worker(self.client)
        from ntkgen.engine import worker

        hosts = self._call(socket.gethostname)
        sharers = self.num_own or max(Counter(hosts.values()).values())
        memory_bytes = memory_bytes // self.num_own if memory_bytes is not None and self.num_own else memory_bytes
        limits = WorkerLimits(self.device, memory_bytes, sharers)
        machine = next(iter(self._call(worker.machine, limits, precision, only_one=True).values()))
        budgets: Iterable[Budget] = self._call(worker.budget, limits).values()
        smallest = min(budgets, key=lambda budget: budget.available_bytes)
        return Machine(machine.environment, smallest, machine.rates)

    def _call(self, function: Callable[..., Any], *args: Any, only_one: bool = False) -> dict[str, Any]:
        """Call a function on every worker, or on one. Workers that end during the call give no result.

        Raises:
            WorkerError: If no worker answers.
        """
        until, tries = time.monotonic() + WORKER_SECONDS, 0
        while time.monotonic() < until:
            addresses = sorted(self.workers())
            chosen = [addresses[tries % len(addresses)]] if only_one and addresses else None
            with suppress(OSError):  # the connection closed, because a worker was killed during the call
                results: dict[str, Any] = self.client.run(function, *args, workers=chosen, on_error="ignore")
                if results:
                    return results
            time.sleep(POLL_SECONDS)
            tries += 1
        raise WorkerError(
            f"No worker of the cluster at {self.address} answers: expected at least one, and waited {WORKER_SECONDS} "
            "seconds. Do the workers crash when they start? Read their logs, and run the same command again. Finished "
            "tiles are kept."
        )

    @property
    def address(self) -> str:
        """Address of the scheduler."""
        return address_of(self.client)

    @property
    def dashboard(self) -> str:
        """URL of dask's dashboard."""
        return str(self.client.dashboard_link)

    def run(self, store: KernelStore, load: Loader, *, cached_blocks: int, report: Report) -> None:
        """Compute and commit the missing parts of a store, as `ntkgen.engine.run.run` does in one process."""
        from ntkgen.engine import worker

        assignment = Assignment(shared(store.folder), load, self.device, self.num_own > 0, cached_blocks)
        name = f"ntkgen-{uuid.uuid4().hex}"  # unique, because the workers may serve several runs at the same time
        self._register(worker.TilePlugin(assignment), name)
        try:
            self._run(store, name, cached_blocks, report)
        finally:
            self._unregister(name)
        store.finalize()

    def _register(self, plugin: "WorkerPlugin", name: str) -> None:
        """Send the plugin of a run to all workers, and to workers that start later.

        Raises:
            WorkerError: If every attempt fails.
        """
        for _ in range(MAX_REGISTRATIONS):
            with suppress(OSError):  # a worker was killed during the call, after dask had stored the plugin
                self.client.register_plugin(plugin, name=name)
                return
            time.sleep(POLL_SECONDS)
        raise WorkerError(
            f"The run could not be sent to the workers of the cluster at {self.address}: expected them to stay "
            f"connected, and tried {MAX_REGISTRATIONS} times. Do the workers crash when they start? Read their logs, "
            "and run the same command again."
        )

    def _unregister(self, name: str) -> None:
        """Make all workers release a run."""
        from ntkgen.engine import worker

        with suppress(OSError, ValueError):  # a worker that was killed holds nothing to release
            self.client.run(worker.release, name, on_error="ignore")
        with suppress(OSError, ValueError):
            self.client.unregister_worker_plugin(name)

    def _run(self, store: KernelStore, name: str, cached_blocks: int, report: Report) -> None:
        plan, missing, total = store.manifest.plan, store.missing_blocks(), store.grid.num_sides
        flops = projected_flops(plan, (), cached_blocks, missing)
        seconds = seconds_at_planned_rate(plan, flops) / max(1, len(missing))
        jobs = diagonal_jobs(missing, job_size(len(missing), self.num_workers, seconds))
        self._finish(name, jobs, counter(report, "diagonal", total - len(missing), total), seconds)
        store.create_kernels()
        tiles, total = store.missing_tiles(), plan.grid.num_tiles
        seconds = seconds_at_planned_rate(plan, projected_flops(plan, tiles, cached_blocks)) / max(1, len(tiles))
        jobs = tile_jobs(bands_of(plan, tiles, cached_blocks), job_size(len(tiles), self.num_workers, seconds))
        self._finish(name, jobs, counter(report, "tiles", total - len(tiles), total), seconds)

    @property
    def num_workers(self) -> int:
        """Number of workers, at least 1."""
        return max(1, len(self.workers()))

    def _finish(self, name: str, jobs: Iterable[Job], step: Step, projected_seconds: float) -> None:
        """Run jobs until all are finished. ``projected_seconds`` is the projected duration of one tile."""
        settings = SchedulerSettings(self.num_own, projected_seconds, self.tile_seconds)
        scheduler = Scheduler(jobs, settings, time.monotonic())
        futures: dict[str, Future[Outcome]] = {}  # by the address of the worker
        try:
            while not scheduler.is_finished:
                if scheduler.observe(self.workers(), time.monotonic()):
                    self._start_missing_workers()
                for pending in scheduler.assign(time.monotonic()):
                    futures[pending.worker] = self._submit(name, pending.job, pending.worker)
                for worker in self._ended(futures):
                    self._collect(futures.pop(worker), worker, scheduler, step)
                for withdrawal in scheduler.withdraw(time.monotonic()):
                    futures.pop(withdrawal.worker).cancel(force=True)
                    if withdrawal.has_stalled:
                        self._restart(withdrawal.worker)
        finally:
            self.client.cancel(list(futures.values()), force=True)

    def _collect(self, future: "Future[Outcome]", worker: str, scheduler: Scheduler, step: Step) -> None:
        """Tell the scheduler how a job has ended.

        Raises:
            Exception: If the job failed with an error that every other worker would get too.
        """
        outcome = self._outcome(future, worker)
        future.release()
        if outcome is None:
            scheduler.lose(worker)
        elif isinstance(outcome, BaseException):
            scheduler.fail(worker, outcome)
        elif outcome.error is not None:
            raise outcome.error
        else:
            for _ in range(scheduler.finish(worker, outcome.seconds)):
                step()

    def _start_missing_workers(self) -> None:
        """Start local workers again that dask has given up, for example because they were killed while starting."""
        if self.num_own and self.client.cluster is not None:
            with suppress(KeyError, OSError, RuntimeError):
                self.client.cluster.scale(self.num_own)

    def workers(self) -> set[str]:
        """List the addresses of the workers.

        Raises:
            WorkerError: If the scheduler of the cluster does not answer.
        """
        try:
            return set(self.client.nthreads())
        except OSError as error:
            raise WorkerError(
                f"The scheduler of the cluster does not answer ({' '.join(str(error).split())[:100]}): expected it to "
                "run until the end. Was the scheduler or its machine stopped? Start a scheduler, then run the same "
                "command again. Finished tiles are kept."
            ) from error

    def _submit(self, name: str, job: Job, worker: str) -> "Future[Outcome]":
        from ntkgen.engine.worker import do_job

        gpu = {"GPU": 1} if "GPU" in self._resources(worker) else None
        return self.client.submit(do_job, name, job, workers=[worker], pure=False, resources=gpu)

    def _resources(self, worker: str) -> Mapping[str, float]:
        resources: Mapping[str, float] = (
            self.client.scheduler_info(n_workers=-1)["workers"].get(worker, {}).get("resources", {})
        )
        return resources

    def _ended(self, futures: "Mapping[str, Future[Outcome]]") -> list[str]:
        """Wait a moment for jobs to end, and return their workers.

        Dask's own `wait` is not used, because it changes the settings of the whole process while it waits.
        """
        until = time.monotonic() + POLL_SECONDS
        while not (ended := [worker for worker in futures if futures[worker].done()]) and time.monotonic() < until:
            time.sleep(LOOK_SECONDS)
        return ended

    def _outcome(self, future: "Future[Outcome]", worker: str) -> Outcome | BaseException | None:
        """Fetch the outcome of a job, or the error it has raised. Return None if the job was lost with its worker.

        The worker holds the outcome until it is fetched. If the worker is killed before that, dask waits without a
        limit, because it may not run the job on another worker. Therefore the worker is checked before each attempt.
        """
        from distributed import KilledWorker

        while future.status in {"finished", "error"} and worker in self.workers():
            try:
                if future.status == "error":
                    error = future.exception(timeout=FETCH_SECONDS)
                    return None if isinstance(error, KilledWorker) else error
                outcome: Outcome = future.result(timeout=FETCH_SECONDS)
            except TimeoutError:
                continue
            except CancelledError:
                return None
            return outcome
        future.cancel(force=True)
        return None

    def _restart(self, worker: str) -> None:
        """Restart a worker. A local worker is killed, which is quick. Any other is restarted by its nanny, if any."""
        for nanny in self.nannies:
            if nanny.worker_address == worker and nanny.pid is not None:
                os.kill(nanny.pid, signal.SIGKILL)
                return
        with suppress(ValueError, OSError, TimeoutError):
            self.client.restart_workers([worker], timeout=CONNECT_SECONDS, raise_for_error=False)

    @property
    def nannies(self) -> "list[Nanny]":
        """Dask's supervisors of the local workers."""
        return list(self.client.cluster.workers.values()) if self.num_own and self.client.cluster is not None else []


@contextmanager
def open_pool(
    workers: int | None, client: "Client | str | None", device: str, tile_seconds: float | None = None
) -> Iterator[WorkerPool | None]:
    """Start workers on this machine, or connect to those of a cluster. Yield None if this process computes alone.

    Args:
        workers: Number of processes to start.
        client: Client of a running cluster, address of its scheduler, or the scheduler's file.
        device: Device of each worker.
        tile_seconds: Time in seconds after which a tile counts as stalled.

    Raises:
        InputError: If both ``workers`` and ``client`` are given, or if no cluster answers.
    """
    if workers is not None and client is not None:
        raise InputError(
            "Both `workers` on this machine and the `client` of a running cluster were given: expected one of them. "
            "Should the cluster compute? Leave out `workers` or `client`."
        )
    if workers is None and client is None:
        yield None
        return
    with ExitStack() as stack:
        if client is None:
            client = stack.enter_context(own_cluster(workers or 0))
        elif isinstance(client, str):
            client = stack.enter_context(connected(client))
        yield WorkerPool(client, device, workers or 0, tile_seconds)
