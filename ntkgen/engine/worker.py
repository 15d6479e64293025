"""A worker of a dask cluster: it loads network and samples once, and computes and commits what it is told."""

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

from ntkgen.engine.jobs import THREADS, Assignment, Job, Outcome, WorkerLimits
from ntkgen.engine.machine import Machine, check_environment, choose_device, describe_machine, memory_budget
from ntkgen.engine.run import Bench
from ntkgen.errors import FingerprintError, NtkgenError, WorkerError
from ntkgen.files.lock import tile_lock
from ntkgen.fingerprints import parameter_fingerprint
from ntkgen.jacobian.network import prepare
from ntkgen.jacobian.outputs import output_map
from ntkgen.jacobian.precision import policy
from ntkgen.plan.plan import Band, Budget
from ntkgen.store.opening import open_store

# Errors that would befall every other worker too.
_FATAL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}


def dask_setup(worker: Worker) -> None:  # noqa: ARG001 - as dask calls it
    """Leave Ctrl-C to the coordinator, which ends its workers: called by dask in a worker of ours as it starts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Hand(WorkerPlugin):
    """A worker's plugin: the bench it computes at, made with its first job and kept for the next ones."""

    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment

    def setup(self, worker: Worker) -> None:
        """Note which worker this is; called by dask."""
        self.number = worker.name if isinstance(worker.name, int) else 0
        self.busy = threading.Lock()
        self.held = ExitStack()
        self.bench: Bench | None = None
        self.is_dismissed = False

    def teardown(self, worker: Worker) -> None:  # noqa: ARG002 - as dask calls it
        """Let go of everything; called by dask."""
        self.let_go()

    def let_go(self) -> None:
        """Drop the bench, and the right to write tiles: now, or when the job at hand has come to its next tile."""
        self.is_dismissed = True
        if self.busy.acquire(blocking=False):
            self._drop()
            self.busy.release()

    def _drop(self) -> None:
        self.bench = None
        self.held.close()

    def _go_on(self) -> None:
        """Stop where nobody waits for the rest of a job any more.

        Raises:
            WorkerError: If the run has ended.
        """
        if self.is_dismissed:
            raise WorkerError("The run that this job is of has ended: expected no more of it. Was it interrupted?")

    def do(self, job: Job) -> Outcome:
        """Do a job; an error that would befall every other worker too is returned, for all others it is tried again.

        Raises:
            OSError: If it is one that another try may not meet.
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
                if self.is_dismissed:
                    self._drop()
        return Outcome(time.monotonic() - started)

    def _do(self, job: Job) -> None:
        self._go_on()
        if self.bench is None:
            self.held.enter_context(tile_lock(self.assignment.folder))
            self.bench = make_bench(self.assignment, _device(self.assignment, self.number))
        self.bench.commit_diagonal(job.indices, self._go_on)
        tiles = tuple(tile for tile in job.band.tiles if not self.bench.store.has_tile(tile))
        self.bench.commit_tiles([Band(job.band.held, tiles)] if tiles else [], self._go_on)


def do_job(name: str, job: Job) -> Outcome:
    """Do a job on the worker that this runs on."""
    hand = get_worker().plugins[name]
    assert isinstance(hand, Hand)
    return hand.do(job)


def let_go(name: str, dask_worker: Worker) -> None:
    """Have a worker let go of a run: called on it by dask, which names it."""
    hand = dask_worker.plugins.get(name)
    if isinstance(hand, Hand):
        hand.let_go()


def make_bench(assignment: Assignment, device: torch.device) -> Bench:
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
            f"{assignment.folder} was made of. Does it see other files under the same paths? Give the workers the same "
            "--data-dir and the same folder of results."
        )
    check_environment(store.manifest.plan, device)
    plan = store.manifest.plan
    network = prepare(model.to(device), inputs.probe, policy(plan.precision), device, plan.profile.fallback)
    network = network.seen_through(output_map(identity["output"], network.profile.num_logits).matrix)
    return Bench(network, inputs.all, store, cached_blocks=assignment.cached_blocks)


def _device(assignment: Assignment, number: int) -> torch.device:
    """Choose a worker's device: of the GPUs of a machine each of our own workers has its own."""
    device = choose_device(assignment.device)
    is_ours = assignment.is_local and device.type == "cuda" and ":" not in assignment.device
    return torch.device("cuda", number % torch.cuda.device_count()) if is_ours else device


def machine(limits: WorkerLimits, precision: str, dask_worker: Worker) -> Machine:
    """Describe what a worker has: called on it by dask, which names it."""
    device = choose_device(limits.device)
    threads = int(os.environ.get(THREADS, "0")) or max(1, len(os.sched_getaffinity(0)) // limits.sharers)
    found = describe_machine(device, precision, limits.memory_bytes, threads=threads)
    return replace(found, budget=budget(limits, dask_worker))


def budget(limits: WorkerLimits, dask_worker: Worker) -> Budget:
    """Say how many bytes a worker may take: what was asked for, or its part of the machine, or dask's limit for it."""
    device = choose_device(limits.device)
    limit = None if device.type == "cuda" else dask_worker.memory_manager.memory_limit
    return memory_budget(device, limits.memory_bytes, sharers=_sharers(device, limits.sharers), limit=limit)


def _sharers(device: torch.device, on_host: int) -> int:
    """Say how many of a host's workers share one device."""
    return -(-on_host // torch.cuda.device_count()) if device.type == "cuda" else on_host
