"""The right of one process to write what lies at a path."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ntkgen.errors import StoreLockedError


@contextmanager
def write_lock(path: Path) -> Iterator[None]:
    """Hold the right to write what lies at a path, through a lock file beside it; the kernel drops it if we die.

    Raises:
        StoreLockedError: If another process holds it.
    """
    lock = path.with_name(path.name + ".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreLockedError(
                f"Another process is writing {path} (it holds {lock.name}). Two writers would do the same work twice. "
                "Wait for it, or give this one another --out."
            ) from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
