"""The worker side of a run on a dask cluster: load network and samples once, then compute and commit tiles."""

import errno
import os
import signal
import socket
import threading
import time
from contextlib import ExitStack
from dataclasses import replace

import torch
from distributed import Worker, WorkerPlugin, get_worker

from ntkgen.engine.identity import network_of
from ntkgen.engine.jobs import THREADS, Assignment, Job, Outcome, WorkerLimits
from ntkgen.engine.machine import Machine, check_environment, choose_device, describe_machine, memory_budget
from ntkgen.engine.run import TileComputer
from ntkgen.errors import FingerprintError, NtkgenError, WorkerError
from ntkgen.files.lock import tile_lock
from ntkgen.fingerprints import parameter_fingerprint
from ntkgen.plan.order import Band
from ntkgen.plan.plan import Budget
from ntkgen.store.opening import open_store

# Codes of operating system errors that every other worker would get too.
_FATAL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}


def dask_setup(worker: Worker) -> None:  # noqa: ARG001 - as dask calls it
    """Ignore Ctrl-C, because the coordinator ends its workers. Dask calls this when a local worker starts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class TilePlugin(WorkerPlugin):
    """Holds the tile computer and the lock of a worker, from its first job of a run until the run ends."""

    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment

    def setup(self, worker: Worker) -> None:
        """Store the number of the worker. Called by dask."""
        self.number = worker.name if isinstance(worker.name, int) else 0
        self.busy = threading.Lock()
        self.held = ExitStack()
        self.computer: TileComputer | None = None
        self.is_released = False

    def teardown(self, worker: Worker) -> None:  # noqa: ARG002 - as dask calls it
        """Release the tile computer and the lock. Called by dask."""
        self.release()

    def release(self) -> None:
        """Drop the tile computer and the lock on the tiles, now or when the current job reaches its next tile."""
        self.is_released = True
        if self.busy.acquire(blocking=False):
            self._drop()
            self.busy.release()

    def _drop(self) -> None:
        self.computer = None
        self.held.close()

    def _require_active(self) -> None:
        """Refuse to compute for a run that has ended.

        Raises:
            WorkerError: If the run has ended.
        """
        if self.is_released:
            raise WorkerError(
                "The run of this job has ended: expected no more jobs of this run, found one. Was the run interrupted? "
                "Run the same command again."
            )

    def do(self, job: Job) -> Outcome:
        """Do a job. An error that every other worker would get too is returned in the outcome.

        Raises:
            OSError: If another attempt may succeed.
        """
        started = time.monotonic()
        with self.busy:
            try:
                self._do(job)
            except NtkgenError as error:
                return Outcome(time.monotonic() - started, error)
            except OSError as error:
                if error.errno not in _FATAL:
                    raise
                return Outcome(time.monotonic() - started, error)
            finally:
                if self.is_released:
                    self._drop()
        return Outcome(time.monotonic() - started)

    def _do(self, job: Job) -> None:
        self._require_active()
        if self.computer is None:
            self.held.enter_context(tile_lock(self.assignment.folder))
            self.computer = make_computer(self.assignment, _device(self.assignment, self.number))
        self.computer.commit_diagonal(job.indices, self._require_active)
        tiles = tuple(tile for tile in job.band.tiles if not self.computer.store.has_tile(tile))
        self.computer.commit_tiles([Band(job.band.held, tiles)] if tiles else [], self._require_active)


def do_job(name: str, job: Job) -> Outcome:
    """Do a job on the current worker. Called by dask."""
    plugin = get_worker().plugins[name]
    assert isinstance(plugin, TilePlugin)
    return plugin.do(job)


def release(name: str, dask_worker: Worker) -> None:
    """Make a worker release a run. Called by dask, which passes the worker."""
    plugin = dask_worker.plugins.get(name)
    if isinstance(plugin, TilePlugin):
        plugin.release()


def make_computer(assignment: Assignment, device: torch.device) -> TileComputer:
    """Load network and samples, and check that they are those of the store.

    Raises:
        FingerprintError: If the fingerprints differ.
    """
    store = open_store(assignment.folder, mode="r+")
    model, inputs = assignment.load()
    identity = store.manifest.identity
    loaded = {"parameters": parameter_fingerprint(model), "samples": inputs.fingerprint()}
    if differing := [name for name, value in loaded.items() if identity.get(name) != value]:
        raise FingerprintError(
            f"A worker on {socket.gethostname()} has loaded other {' and '.join(differing)} than the store at "
            f"{assignment.folder} was made from: expected equal fingerprints, found different ones. Does the worker "
            "see other files under the same paths? Give the workers the same `data_dir` and the same folder of results."
        )
    check_environment(store.manifest.plan, device)
    return TileComputer(
        network_of(store, model, inputs, device), inputs.all, store, cached_blocks=assignment.cached_blocks
    )


def _device(assignment: Assignment, number: int) -> torch.device:
    """Choose the device of a worker. Local workers share the GPUs of the machine evenly."""
    device = choose_device(assignment.device)
    shares_gpus = assignment.is_local and device.type == "cuda" and ":" not in assignment.device
    return torch.device("cuda", number % torch.cuda.device_count()) if shares_gpus else device


def machine(limits: WorkerLimits, precision: str, dask_worker: Worker) -> Machine:
    """Describe the machine of a worker. Called by dask, which passes the worker."""
    device = choose_device(limits.device)
    threads = int(os.environ.get(THREADS, "0")) or max(1, len(os.sched_getaffinity(0)) // limits.sharers)
    described = describe_machine(device, precision, limits.memory_bytes, threads=threads)
    return replace(described, budget=budget(limits, dask_worker))


def budget(limits: WorkerLimits, dask_worker: Worker) -> Budget:
    """Compute the memory of a worker: the requested bytes, its share of the machine, or the limit set by dask."""
    device = choose_device(limits.device)
    limit = None if device.type == "cuda" else dask_worker.memory_manager.memory_limit
    return memory_budget(device, limits.memory_bytes, sharers=_sharers(device, limits.sharers), limit=limit)


def _sharers(device: torch.device, on_host: int) -> int:
    """Compute the number of workers on a host that share one device."""
    return -(-on_host // torch.cuda.device_count()) if device.type == "cuda" else on_host
