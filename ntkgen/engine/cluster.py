"""A running dask cluster: the connection, its address, and folders that its workers find."""

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

CONNECT_SECONDS, WORKER_SECONDS, POLL_SECONDS = 20, 60, 0.1


@contextmanager
def connected(place: str) -> "Iterator[Client]":
    """Connect to a cluster within this block, by the address of its scheduler or the scheduler's file.

    Raises:
        InputError: If there is none.
    """
    from distributed import Client

    if re.fullmatch(r"[\w.-]+:\d+", place):
        place = f"tcp://{place}"
    is_file = "://" not in place
    place = str(expanded(place)) if is_file else place
    where = {"scheduler_file" if is_file else "address": place}
    until = time.monotonic() + CONNECT_SECONDS
    while is_file and not Path(place).exists():  # dask itself would wait for ever
        if time.monotonic() > until:
            _refuse(place, "there is no such file")
        time.sleep(POLL_SECONDS)
    try:
        client = Client(**where, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        _refuse(place, str(error), error)
    with client:
        yield client


def _refuse(place: str, why: str, error: Exception | None = None) -> NoReturn:
    """Report that there is no cluster.

    Raises:
        InputError: Always.
    """
    raise InputError(
        f"No cluster answers at {place} ({' '.join(why.split())[:100]}): expected the address of a dask scheduler, as "
        "tcp://host:8786, or the file that it has written. Is it running, and does a firewall let this machine "
        "through? `dask scheduler` starts one."
    ) from error


def wait_for_a_worker(client: "Client") -> None:
    """Wait until a cluster has a worker.

    Raises:
        InputError: If no worker comes.
    """
    try:
        client.wait_for_workers(1, timeout=WORKER_SECONDS)
    except TimeoutError:
        raise InputError(
            f"The cluster at {address_of(client)} has no workers: expected at least one, found none for "
            f"{WORKER_SECONDS} seconds. Do they still wait in a queue, or did they fail to start? Run the same command "
            "again when there are some."
        ) from None


def address_of(client: "Client") -> str:
    """Return the address of the scheduler."""
    return str(client.scheduler_info(n_workers=0)["address"])


def shared(folder: Folder) -> Folder:
    """Make the path of a folder absolute, because workers run in other folders.

    Raises:
        InputError: If the store lies in the memory of this process.
    """
    if isinstance(folder, StoreFolder) and isinstance(folder.store, MemoryStore):
        raise InputError(
            f"The store at {folder} lies in the memory of this process, where no worker finds it: expected a folder or "
            "an object store. Use one, or no workers."
        )
    return LocalFolder(folder.path, folder.fsync) if isinstance(folder, LocalFolder) else folder
