"""A running dask cluster: the connection, its address, and paths that its workers can open."""

import re
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from zarr.storage import MemoryStore

from ntkgen.errors import InputError
from ntkgen.files.bucket import StoreFolder
from ntkgen.files.folder import Folder, LocalFolder
from ntkgen.files.paths import expanded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distributed import Client

# Timeout of a connection, maximum time without a worker, and interval between two checks.
CONNECT_SECONDS, WORKER_SECONDS, POLL_SECONDS = 20, 60, 0.1


@contextmanager
def connected(place: str) -> "Iterator[Client]":
    """Connect to a cluster within this block, by the address of its scheduler or by the scheduler's file.

    Raises:
        InputError: If no cluster answers.
    """
    from distributed import Client

    if re.fullmatch(r"[\w.-]+:\d+", place):
        place = f"tcp://{place}"
    is_file = "://" not in place
    place = str(expanded(place)) if is_file else place
    where = {"scheduler_file" if is_file else "address": place}
    until = time.monotonic() + CONNECT_SECONDS
    while is_file and not Path(place).exists():  # Dask has no timeout for a missing file
        if time.monotonic() > until:
            _refuse(place, "there is no such file")
        time.sleep(POLL_SECONDS)
    try:
        client = Client(**where, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        _refuse(place, str(error), error)
    with client:
        yield client


def _refuse(place: str, reason: str, error: Exception | None = None) -> NoReturn:
    """Report that no cluster answers.

    Raises:
        InputError: Always.
    """
    raise InputError(
        f"No cluster answers at {place} ({' '.join(reason.split())[:100]}): expected the address of a dask scheduler, "
        "such as tcp://host:8786, or the file that the scheduler has written. Is the scheduler not running, or does a "
        "firewall block the connection? Start one with `dask scheduler`, or correct the address."
    ) from error


def wait_for_a_worker(client: "Client") -> None:
    """Wait until a cluster has a worker.

    Raises:
        InputError: If no worker connects in time.
    """
    try:
        client.wait_for_workers(1, timeout=WORKER_SECONDS)
    except TimeoutError:
        raise InputError(
            f"The cluster at {address_of(client)} has no workers: expected at least one, found none for "
            f"{WORKER_SECONDS} seconds. Do they still wait in a queue, or did they fail to start? Run the same command "
            "again when the cluster has workers."
        ) from None


def address_of(client: "Client") -> str:
    """Return the address of the scheduler."""
    return str(client.scheduler_info(n_workers=0)["address"])


def shared(folder: Folder) -> Folder:
    """Make the path of a folder absolute, because workers have other current directories.

    Raises:
        InputError: If the store is in the memory of this process.
    """
    if isinstance(folder, StoreFolder) and isinstance(folder.store, MemoryStore):
        raise InputError(
            f"The store at {folder} is in the memory of this process, which workers cannot read: expected a folder or "
            "an object store, found a MemoryStore. Should the result not be kept? Use a folder or an object store, or "
            "leave out `workers` and `client`."
        )
    return LocalFolder(folder.path, folder.fsync) if isinstance(folder, LocalFolder) else folder
