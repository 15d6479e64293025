"""Worker processes on this machine, as a dask cluster that ends with the run."""

import logging
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from ntkgen.engine.jobs import THREADS
from ntkgen.engine.spawning import require_main_guard, starting_processes, unguarded, without_missing_script
from ntkgen.errors import InputError, WorkerError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distributed import Client, LocalCluster


@contextmanager
def own_cluster(workers: int) -> "Iterator[Client]":
    """Start worker processes that share the threads of this machine. They end with this block or this process.

    Raises:
        InputError: If the number is below 1, or if each started process makes this call too.
        WorkerError: If the processes do not start.
    """
    require_main_guard()
    import dask
    from distributed import Client, LocalCluster

    if workers < 1:
        raise InputError(
            f"`workers` is not a possible number of processes: expected 1 or more, found {workers}. Should this "
            "process compute alone? Leave `workers` out."
        )
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
                    f"The {workers} workers did not start ({error}): expected {workers} running processes. Was one of "
                    "them killed, or is there too little memory? Run the same command again with fewer `workers`."
                ) from error
        held.enter_context(_closed_quietly(cluster))
        yield held.enter_context(Client(cluster, set_as_default=False))


@contextmanager
def _closed_quietly(cluster: "LocalCluster") -> "Iterator[LocalCluster]":
    """Close a cluster at the end of the block. Dask raises KeyError for a worker that was killed while it started."""
    try:
        yield cluster
    finally:
        with suppress(KeyError, OSError, TimeoutError):
            cluster.close()
