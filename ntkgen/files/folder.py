"""Folders of results: the interface for all types of storage, and its implementation for a disk.

A file is durable before it becomes visible. On a disk `ntkgen.files.durable` ensures this. An object store acknowledges
an object only after it is stored safely.
"""

import contextlib
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from zarr.abc.store import Store

from ntkgen.errors import InputError
from ntkgen.files import paths
from ntkgen.files.durable import PARTIAL, DurableStore, write_file


class Folder(ABC):
    """A folder with named files. A key is the relative path of a file, with slashes."""

    @abstractmethod
    def __str__(self) -> str:
        """Return the path or URL of the folder, as the user wrote it."""

    @abstractmethod
    def __truediv__(self, name: str) -> "Folder":
        """Return a folder inside this one."""

    @property
    @abstractmethod
    def parent(self) -> "Folder":
        """The folder that contains this one."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of this folder in its parent folder."""

    @abstractmethod
    def sizes(self, prefix: str = "") -> dict[str, int]:
        """List the keys in a folder, given as prefix, with their sizes in bytes. Unfinished files are not listed."""

    @abstractmethod
    def read(self, key: str) -> bytes | None:
        """Read a whole file. Return None if it does not exist."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Write a file atomically and durably."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """Remove a file if it exists."""

    @abstractmethod
    def zarr_store(self, *, read_only: bool) -> Store:
        """Open the folder for Zarr."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Return the size of a file in bytes, or None if it does not exist."""

    def has(self, key: str) -> bool:
        """Return whether a file exists."""
        return self.size(key) is not None

    def sweep(self, pattern: str = "*") -> None:  # noqa: ARG002 - an object store has no leftovers
        """Remove leftovers of interrupted writes of files that match a pattern. No process may write meanwhile."""
        return

    def clear(self) -> None:
        """Remove every file."""
        for key in self.sizes():
            self.remove(key)

    @property
    def free_bytes(self) -> int | None:
        """The free space in bytes, or None if it is not known."""
        return None

    def require_writable(self) -> None:
        """Refuse a folder that cannot be written or created. By default nothing is checked."""
        return


@dataclass(frozen=True)
class LocalFolder(Folder):
    """A folder of a file system. Without ``fsync`` a loss of power may undo writes.

    The path is converted to an absolute path. Messages show it as it was given.
    """

    path: Path
    fsync: bool = True
    shown: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shown", self.shown or str(self.path))
        object.__setattr__(self, "path", paths.absolute(self.path))

    def __str__(self) -> str:
        return self.shown

    def __truediv__(self, name: str) -> "LocalFolder":
        return LocalFolder(self.path / name, self.fsync, str(Path(self.shown) / name))

    @property
    def parent(self) -> "LocalFolder":
        """The folder that contains this one."""
        shown = Path(self.shown)
        above = shown.parent if shown.name not in {"", "..", "~"} else shown / ".."
        return LocalFolder(self.path.parent, self.fsync, str(above))

    @property
    def name(self) -> str:
        """The name of this folder in its parent folder."""
        return self.path.name

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """List the keys in a folder, given as prefix, with their sizes in bytes."""
        return dict(_scan(str(self.path / prefix), prefix))

    def read(self, key: str) -> bytes | None:
        """Read a whole file. Return None if it does not exist."""
        try:
            return (self.path / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def size(self, key: str) -> int | None:
        """Return the size of a file in bytes, or None if it does not exist."""
        path = self.path / key
        try:
            return path.stat().st_size if path.is_file() else None
        except FileNotFoundError:
            return None

    def write(self, key: str, data: bytes) -> None:
        """Write a file atomically and durably."""
        write_file(self.path / key, data, fsync=self.fsync)

    def remove(self, key: str) -> None:
        """Remove a file if it exists."""
        (self.path / key).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove every file, and the folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    def zarr_store(self, *, read_only: bool) -> Store:
        """Open the folder for Zarr."""
        return DurableStore(self.path, read_only=read_only, fsync=self.fsync)

    def sweep(self, pattern: str = "*") -> None:
        """Remove leftovers of interrupted writes of files that match a pattern. No process may write meanwhile."""
        for leftover in self.path.rglob(f"{pattern}{PARTIAL}") if pattern == "*" else self.path.glob(pattern + PARTIAL):
            leftover.unlink(missing_ok=True)

    @property
    def free_bytes(self) -> int | None:
        """The free space in bytes of the file system of this folder, which need not exist yet."""
        return int(psutil.disk_usage(str(self._nearest)).free)

    def require_writable(self) -> None:
        """Refuse a folder that cannot be written or created.

        Raises:
            InputError: If the path or one of its parents is a file, or permission is missing.
        """
        self.require_no_dangling_link()
        nearest = self._nearest
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise InputError(
                f"Nothing can be written below {nearest}: expected a folder with permission to write, found "
                f"{'one without' if nearest.is_dir() else 'a file'}. Is the path spelled right? Choose another."
            )

    def require_no_dangling_link(self) -> None:
        """Refuse a folder that is, or is inside, a symbolic link without a target.

        Raises:
            InputError: If there is such a link.
        """
        for place in (self.path, *self.path.parents):
            if place.is_symlink() and not place.exists():
                raise InputError(
                    f"Nothing can be written to {self}: expected a folder or an unused path, found {place}, a symbolic "
                    f"link to {os.readlink(place)}, which does not exist. Was the target moved, or its disk not "
                    "mounted? Create the target, or remove the link."
                )

    @property
    def _nearest(self) -> Path:
        return next(folder for folder in (self.path, *self.path.parents) if folder.exists())


def _scan(folder: str, prefix: str) -> Iterator[tuple[str, int]]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            key = f"{prefix}/{entry.name}" if prefix else entry.name
            if entry.is_dir():
                yield from _scan(entry.path, key)
            elif not entry.name.endswith(PARTIAL):
                with contextlib.suppress(FileNotFoundError):
                    yield key, entry.stat().st_size


@dataclass(frozen=True)
class File:
    """A file of a folder."""

    folder: Folder
    name: str

    def __str__(self) -> str:
        return str(self.folder / self.name)

    @property
    def exists(self) -> bool:
        """Whether the file exists."""
        return self.folder.has(self.name)

    def require_writable(self) -> None:
        """Refuse a file that cannot be written.

        Raises:
            InputError: If the path is a folder, or the folder of the file cannot be written.
        """
        if isinstance(self.folder, LocalFolder) and (self.folder.path / self.name).is_dir():
            raise InputError(
                f"No file can be written to {self}: expected a file or an unused path, found a folder. Was the name of "
                "the file left out? Give the path of a file in this folder."
            )
        self.folder.require_writable()


def file_of(place: "File | str | os.PathLike[str]") -> File:
    """Convert a path to a file of a local folder."""
    if isinstance(place, File):
        return place
    folder = LocalFolder(Path(place))
    return File(folder.parent, folder.name)
