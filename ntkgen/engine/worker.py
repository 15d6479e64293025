"""A worker of a dask cluster: it loads network and samples once, and computes and commits the tiles of its jobs."""

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
from ntkgen.plan.plan import Band, Budget
from ntkgen.store.opening import open_store

# Errors that every other worker would meet too.
_FATAL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}


def dask_setup(worker: Worker) -> None:  # noqa: ARG001 - as dask calls it
    """Leave Ctrl-C to the coordinator, which ends its workers: called by dask in a worker of ours as it starts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class TilePlugin(WorkerPlugin):
    """Holds what a worker computes tiles with, from its first job of a run until the run ends."""

    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment

    def setup(self, worker: Worker) -> None:
        """Note which worker this is; called by dask."""
        self.number = worker.name if isinstance(worker.name, int) else 0
        self.busy = threading.Lock()
        self.held = ExitStack()
        self.computer: TileComputer | None = None
        self.is_released = False

    def teardown(self, worker: Worker) -> None:  # noqa: ARG002 - as dask calls it
        """Release everything; called by dask."""
        self.release()

    def release(self) -> None:
        """Drop the computer and the lock on the tiles: now, or when the current job has come to its next tile."""
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
            WorkerError: If it has.
        """
        if self.is_released:
            raise WorkerError(
                "The run of this job has ended: expected no more of its jobs. Was it interrupted? Run the same command "
                "again."
            )

    def do(self, job: Job) -> Outcome:
        """Do a job. An error that every other worker would meet is returned; any other is raised, to be tried again.

        Raises:
            OSError: If another attempt may not meet it.
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
    """Do a job on the current worker; called by dask."""
    plugin = get_worker().plugins[name]
    assert isinstance(plugin, TilePlugin)
    return plugin.do(job)


def release(name: str, dask_worker: Worker) -> None:
    """Make a worker release a run; called by dask, which passes the worker."""
    plugin = dask_worker.plugins.get(name)
    if isinstance(plugin, TilePlugin):
        plugin.release()


def make_computer(assignment: Assignment, device: torch.device) -> TileComputer:
    """Load network and samples, and check that they are those of the store.

    Raises:
        FingerprintError: If they are not.
    """
    store = open_store(assignment.folder, mode="r+")
    model, inputs = assignment.load()
    identity = store.manifest.identity
    found = {"parameters": parameter_fingerprint(model), "samples": inputs.fingerprint()}
    if differing := [name for name, value in found.items() if identity.get(name) != value]:
        raise FingerprintError(
            f"A worker on {socket.gethostname()} has found other {' and '.join(differing)} than the store at "
            f"{assignment.folder} was made of: expected equal fingerprints. Does it see other files under the same "
            "paths? Give the workers the same `data_dir` and the same folder of results."
        )
    check_environment(store.manifest.plan, device)
    return TileComputer(
        network_of(store, model, inputs, device), inputs.all, store, cached_blocks=assignment.cached_blocks
    )


def _device(assignment: Assignment, number: int) -> torch.device:
    """Choose a worker's device. Workers of our own share the GPUs of the machine evenly."""
    device = choose_device(assignment.device)
    is_ours = assignment.is_local and device.type == "cuda" and ":" not in assignment.device
    return torch.device("cuda", number % torch.cuda.device_count()) if is_ours else device


def machine(limits: WorkerLimits, precision: str, dask_worker: Worker) -> Machine:
    """Describe the machine of a worker; called by dask, which passes the worker."""
    device = choose_device(limits.device)
    threads = int(os.environ.get(THREADS, "0")) or max(1, len(os.sched_getaffinity(0)) // limits.sharers)
    found = describe_machine(device, precision, limits.memory_bytes, threads=threads)
    return replace(found, budget=budget(limits, dask_worker))


def budget(limits: WorkerLimits, dask_worker: Worker) -> Budget:
    """Compute how many bytes a worker may take: the request, its part of the machine, or dask's limit for it."""
    device = choose_device(limits.device)
    limit = None if device.type == "cuda" else dask_worker.memory_manager.memory_limit
    return memory_budget(device, limits.memory_bytes, sharers=_sharers(device, limits.sharers), limit=limit)


def _sharers(device: torch.device, on_host: int) -> int:
    """Count the workers of a host that share one device."""
    return -(-on_host // torch.cuda.device_count()) if device.type == "cuda" else on_host
