"""Atomic and durable writes of files. A loss of power never leaves a partial file.

A file is written under a temporary name in the same folder, synchronised to the disk, and renamed. Then the folder is
synchronised too.
"""

import asyncio
import errno
import os
import uuid
from pathlib import Path
from typing import Any

from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from ntkgen.files.paths import beside

# Suffix of the temporary name of a file that is being written.
PARTIAL = ".partial"


def write_file(path: Path, data: Any, *, fsync: bool = True, exclusive: bool = False) -> None:
    """Write a file atomically: under a temporary name, synchronised to the disk, then renamed.

    Raises:
        FileExistsError: If ``exclusive`` is set and the file exists.
    """
    draft = beside(path, f".{uuid.uuid4().hex}{PARTIAL}")
    changed: list[Path] = []
    try:
        try:
            file = draft.open("wb")
        except (FileNotFoundError, NotADirectoryError):  # rare, so that most writes do not look for their folder
            changed = _make_folders(path.parent)
            file = draft.open("wb")
        with file:
            file.write(data)
            if fsync:
                file.flush()
                os.fsync(file.fileno())
        if exclusive:
            os.link(draft, path)
            draft.unlink()
        else:
            draft.replace(path)
    except Exception:  # if the process is killed, the draft stays until a sweep removes it
        draft.unlink(missing_ok=True)
        raise
    for folder in {path.parent, *changed} if fsync else ():
        _sync_folder(folder)


def _make_folders(folder: Path) -> list[Path]:
    """Create a folder and its parents. Return the folders that got a new entry."""
    missing = [above for above in (folder, *folder.parents) if not above.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return [above.parent for above in missing]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems do not support or need it
        if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM}:
            raise
    finally:
        os.close(handle)


class DurableStore(LocalStore):
    """Zarr's local store with durable writes. Those of Zarr are atomic, but not synchronised to the disk."""

    def __init__(self, root: Path | str, *, read_only: bool = False, fsync: bool = True) -> None:
        super().__init__(root, read_only=read_only)
        self.fsync = fsync

    def with_read_only(self, read_only: bool = False) -> "DurableStore":  # noqa: FBT001, FBT002 - as in Zarr
        """Open the same folder for reading or for writing."""
        return DurableStore(self.root, read_only=read_only, fsync=self.fsync)

    async def _set(self, key: str, value: Buffer, exclusive: bool = False) -> None:  # noqa: FBT001, FBT002 - as in Zarr
        self._check_writable()
        data = value.as_buffer_like()
        await asyncio.to_thread(write_file, self.root / key, data, fsync=self.fsync, exclusive=exclusive)

    def set_sync(self, key: str, value: Buffer) -> None:
        """Write a value from a thread without an event loop. Newer versions of Zarr call this method."""
        self._check_writable()
        write_file(self.root / key, value.as_buffer_like(), fsync=self.fsync)
