"""Files that are there whole or not at all, and survive a loss of power.

A file is written beside its place, forced to the disk, and then renamed, and the folder is forced to the disk too.
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

# How the name of a file ends that is being written.
PARTIAL = ".partial"


def write_file(path: Path, data: Any, *, fsync: bool = True, exclusive: bool = False) -> None:
    """Write a file, whole or not at all: beside its place, forced to the disk, renamed, the folder forced too.

    Raises:
        FileExistsError: If it is there, and must not be.
    """
    made = _make_folders(path.parent)
    draft = beside(path, f".{uuid.uuid4().hex}{PARTIAL}")
    try:
        with draft.open("wb") as file:
            file.write(data)
            if fsync:
                file.flush()
                os.fsync(file.fileno())
        if exclusive:
            os.link(draft, path)
            draft.unlink()
        else:
            draft.replace(path)
    except Exception:  # what ends the process leaves the draft, to be swept
        draft.unlink(missing_ok=True)
        raise
    for folder in {path.parent, *made} if fsync else ():
        _force_folder(folder)


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and those above it; return the folders that got a new entry."""
    missing = [above for above in (folder, *folder.parents) if not above.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return [above.parent for above in missing]


def _force_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems cannot do it, and need not
        if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM}:
            raise
    finally:
        os.close(handle)


class DurableStore(LocalStore):
    """Zarr's local store with writes that survive a loss of power; its own are atomic, but never forced to the disk."""

    def __init__(self, root: Path | str, *, read_only: bool = False, fsync: bool = True) -> None:
        super().__init__(root, read_only=read_only)
        self.fsync = fsync

    def with_read_only(self, read_only: bool = False) -> "DurableStore":  # noqa: FBT001, FBT002 - as in Zarr
        """Open the same folder for reading, or for writing."""
        return DurableStore(self.root, read_only=read_only, fsync=self.fsync)

    async def _set(self, key: str, value: Buffer, exclusive: bool = False) -> None:  # noqa: FBT001, FBT002 - as in Zarr
        self._check_writable()
        data = value.as_buffer_like()
        await asyncio.to_thread(write_file, self.root / key, data, fsync=self.fsync, exclusive=exclusive)

    def set_sync(self, key: str, value: Buffer) -> None:
        """Write a value from a thread without an event loop, which newer versions of Zarr do."""
        self._check_writable()
        write_file(self.root / key, value.as_buffer_like(), fsync=self.fsync)
