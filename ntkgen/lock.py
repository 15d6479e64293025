"""The right of one process to write what lies at a path."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from ntkgen.errors import StoreLockedError


@contextmanager
def write_lock(path: Path) -> Iterator[None]:
    """Hold the right to write what lies at a path, through a lock file beside it; the kernel drops it if we die.

    Raises:
        StoreLockedError: If another process holds it.
    """
    lock = path.with_name(path.name + ".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    file = _locked(lock)
    while file is not None and not _is_at(file, lock):  # its former holder removed it before we had it
        file.close()
        file = _locked(lock)
    if file is None:
        raise StoreLockedError(
            f"Another process is writing {path} (it holds {lock.name}). Two writers would do the same work twice. "
            "Wait for it, or give this one another --out."
        )
    with file:
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _locked(lock: Path) -> TextIO | None:
    """Open and lock a file, or return None where another process holds it."""
    file = lock.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
