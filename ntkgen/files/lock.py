"""The right to write what lies at a path: of one process, or of several that write different tiles.

Two lock files lie beside a store, and vanish with their last holder, unless it is killed. NAME.lock is held by the one
process that may change anything; a whole computation keeps it. NAME.tiles.lock is shared by the processes that write
tiles without it: the workers of a cluster, and the parts of a job array. Leftovers are swept only where none holds
either. The system drops the locks of a process that dies. Where a file system has no locks, and in object stores, there
are none: two processes that do the same work there write equal bytes.
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

# What a lock file says of its holder: that others may wait for it, or not.
SHORT, WHOLE = "short", "whole"
POLL_SECONDS = 0.2
# Time that the workers of a dead coordinator are given to notice it.
ORPHAN_SECONDS = 20.0

_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}


@contextmanager
def write_lock(
    place: Folder | Path, *, is_short: bool = False, waiting: Callable[[], None] | None = None
) -> Iterator[None]:
    """Hold the right to change anything at a place.

    Args:
        place: What is to be written.
        is_short: Whether it will be held for a while alone, so that others may wait for it.
        waiting: Called again and again while such a holder is waited for; None: it is not waited for.

    Raises:
        StoreLockedError: If another process holds it.
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
            "writer, since two would do the same work twice. Wait for it; what computes may also be given another "
            "--out."
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
    """Share the right to write tiles at a place, each process its own."""
    path = _local(place)
    if path is None:
        yield
        return
    lock = _tiles(path)
    while (file := _take(lock, fcntl.LOCK_SH)) is None:  # another process sweeps
        time.sleep(POLL_SECONDS)
    with file:
        try:
            yield
        finally:
            if _try(file, fcntl.LOCK_EX):  # the last one to leave
                lock.unlink(missing_ok=True)


@contextmanager
def without_tile_writers(place: Folder | Path, *, seconds: float = 0.0) -> Iterator[bool]:
    """Keep others from beginning to write tiles; yield whether none does, after ``seconds`` at most."""
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
    """Refuse a place where other processes write tiles, once the workers of a dead coordinator had time to go.

    Raises:
        StoreLockedError: If there are such processes.
    """
    with without_tile_writers(place, seconds=ORPHAN_SECONDS) as is_alone:
        if not is_alone:
            raise StoreLockedError(
                f"Other processes are writing tiles of {place} (they share its .tiles.lock): expected none beside a "
                "whole computation. Are parts of it (--part) or workers of a cluster still at work? Wait for them, or "
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
    """Open and lock a file; None where another process holds it in a way that does not go with this.

    Raises:
        InputError: If there can be no such file.
    """
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = lock.open("a+")  # also for reading: where flock is made of record locks, a shared one needs that
        except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
            raise InputError(
                f"Nothing can be written at {lock.parent} ({type(error).__name__}: {error.strerror}): expected a "
                "folder, or a place for one. Is a file in the way, or is it a file system of the kernel, as /proc is? "
                "Choose another path."
            ) from error
        if not _try(file, kind):
            file.close()
            return None
        if _is_at(file, lock):
            return file
        file.close()  # its former holder removed it before we had it


def _try(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(
            f"The file system of {file.name} has no locks: nothing keeps a second process from the same work.",
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
    """Say whether who holds a lock will soon let go; also where the holder has just gone, or not said yet.

    What a killed process has said is read twice, so that its follower has the time to say something else.
    """
    for seconds in (0.0, POLL_SECONDS):
        time.sleep(seconds)
        try:
            if lock.read_text() != WHOLE:
                return True
        except FileNotFoundError:
            return True
    return False
