"""Locks for writing to a store: for one process, or for several processes that write different tiles.

There are two lock files beside a store. NAME.lock is held by the one process that may change anything, for example
during a whole computation. NAME.tiles.lock is shared by processes that only write tiles: the workers of a cluster, and
the parts of a job array. The last holder of a lock removes its file, unless the process is killed. The operating system
then releases the lock. Leftovers of interrupted writes are removed only while both locks are free. Object stores and
some file systems have no locks. Two processes that do the same work there write equal bytes.
"""

import errno
import fcntl
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ntkgen.errors import InputError, StoreLockedError
from ntkgen.files.folder import Folder, LocalFolder
from ntkgen.files.paths import absolute, beside

# Contents of a lock file. Other processes may wait for a short lock, and not for the lock of a whole computation.
SHORT, WHOLE = "short", "whole"
POLL_SECONDS = 0.2
# Time until the workers of a killed coordinator have noticed it and stopped.
ORPHAN_SECONDS = 20.0

_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}


@contextmanager
def write_lock(
    place: Folder | Path, *, is_short: bool = False, waiting: Callable[[], None] | None = None
) -> Iterator[None]:
    """Hold the exclusive lock of a store or checkpoint.

    Args:
        place: The path that is written.
        is_short: Whether the lock is held only for a short time, so that other processes may wait for it.
        waiting: Called repeatedly while another process holds a short lock. None: do not wait.

    Raises:
        StoreLockedError: If another process holds the lock.
    """
    path = _local(place)
    if path is None:
        yield
        return
    lock = beside(path, ".lock")
    while (file := _take(lock, fcntl.LOCK_EX)) is None and waiting is not None and _is_short(lock):
        waiting()
        time.sleep(POLL_SECONDS)
    if file is None:
        raise StoreLockedError(
            f"Another process is writing {path} (it, or another thread of this one, holds {lock.name}): expected one "
            "writer, since two would do the same work twice. Wait for it, or write to another path."
        )
    with file:
        file.truncate(0)
        file.write(SHORT if is_short else WHOLE)
        file.flush()
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def tile_lock(place: Folder | Path) -> Iterator[None]:
    """Hold the shared lock of a store, with which each process writes its own tiles."""
    path = _local(place)
    if path is None:
        yield
        return
    lock = _tiles(path)
    while (file := _take(lock, fcntl.LOCK_SH)) is None:  # another process removes leftovers
        time.sleep(POLL_SECONDS)
    with file:
        try:
            yield
        finally:
            if _try(file, fcntl.LOCK_EX):  # no other process holds it
                lock.unlink(missing_ok=True)


@contextmanager
def without_tile_writers(place: Folder | Path, *, seconds: float = 0.0) -> Iterator[bool]:
    """Prevent other processes from writing tiles. Yield whether none writes tiles after at most ``seconds``."""
    path = _local(place)
    if path is None:
        yield True
        return
    lock, until = _tiles(path), time.monotonic() + seconds
    while (file := _take(lock, fcntl.LOCK_EX)) is None and time.monotonic() < until:
        time.sleep(POLL_SECONDS)
    if file is None:
        yield False
        return
    with file:
        try:
            yield True
        finally:
            lock.unlink(missing_ok=True)


def require_no_tile_writers(place: Folder | Path) -> None:
    """Refuse a store if other processes write its tiles. Workers of a killed coordinator get time to stop.

    Raises:
        StoreLockedError: If other processes write tiles.
    """
    with without_tile_writers(place, seconds=ORPHAN_SECONDS) as is_alone:
        if not is_alone:
            raise StoreLockedError(
                f"Other processes are writing tiles of {place} (they share its .tiles.lock): expected none beside a "
                "whole computation. Are parts of it (`part`) or workers of a cluster still at work? Wait for them, or "
                "run the part that is missing."
            )


def _local(place: Folder | Path) -> Path | None:
    if isinstance(place, Path):
        return absolute(place)
    if not isinstance(place, LocalFolder):
        return None
    place.require_no_dangling_link()
    return place.path


def _tiles(path: Path) -> Path:
    return beside(path, ".tiles.lock")


def _take(lock: Path, kind: int) -> IO[str] | None:
    """Open and lock a file. Return None if another process holds a lock that excludes this one.

    Raises:
        InputError: If the file cannot be created.
    """
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = lock.open("a+")  # also readable, because some systems emulate shared locks by record locks
        except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
            raise InputError(
                f"Nothing can be written at {lock.parent} ({type(error).__name__}: {error.strerror}): expected a "
                "folder that exists or can be created. Is there a file of this name, or is it a special file system "
                "such as /proc? Choose another path."
            ) from error
        if not _try(file, kind):
            file.close()
            return None
        if _is_at(file, lock):
            return file
        file.close()  # its former holder removed the file before it was locked here


def _try(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(
            f"The file system of {file.name} has no locks, so a second process may do the same work.",
            RuntimeWarning,
            stacklevel=2,
        )
    return True


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _is_short(lock: Path) -> bool:
    """Return whether a lock is short, or has just been released, or its holder has not written the file yet.

    The contents are read twice with a pause. At first they may still be those of a killed process.
    """
    for seconds in (0.0, POLL_SECONDS):
        time.sleep(seconds)
        try:
            if lock.read_text() != WHOLE:
                return True
        except FileNotFoundError:
            return True
    return False
