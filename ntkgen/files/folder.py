"""A folder of results, one set of verbs for every place, and the one on a disk.

What is written is durable before it is seen: `ntkgen.files.durable` says how for a disk, and an object store
acknowledges an object when it is safe.
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
    """Named files in one place. A key is a path below it, with slashes."""

    @abstractmethod
    def __str__(self) -> str:
        """Name the folder as a user writes it."""

    @abstractmethod
    def __truediv__(self, name: str) -> "Folder":
        """Name a folder inside this one."""

    @property
    @abstractmethod
    def parent(self) -> "Folder":
        """The folder that this one lies in."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What it is called in the folder that it lies in."""

    @abstractmethod
    def sizes(self, prefix: str = "") -> dict[str, int]:
        """List the keys below a prefix that is a folder, with their sizes in bytes; not what is being written."""

    @abstractmethod
    def read(self, key: str) -> bytes | None:
        """Read a file whole; None where there is none."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Write a file, whole or not at all, and durably."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """Remove a file, if it is there."""

    @abstractmethod
    def zarr_store(self, *, read_only: bool) -> Store:
        """Open the folder for Zarr."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Say how many bytes a file has; None where there is none."""

    def has(self, key: str) -> bool:
        """Say whether there is a file."""
        return self.size(key) is not None

    def sweep(self, pattern: str = "*") -> None:  # noqa: ARG002 - an object store leaves nothing
        """Remove what interrupted writes of files that match a pattern have left; only while no process writes."""
        return

    def clear(self) -> None:
        """Remove every file."""
        for key in self.sizes():
            self.remove(key)

    @property
    def free_bytes(self) -> int | None:
        """The room that is left; None where it is not known."""
        return None

    def require_writable(self) -> None:
        """Refuse a folder that cannot be written, or made; of an object store the first write will tell."""
        return


@dataclass(frozen=True)
class LocalFolder(Folder):
    """A folder of a file system. Without ``fsync`` a power loss may undo what was written.

    Its path is made absolute, and it is shown as it was given.
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
        """The folder that this one lies in."""
        shown = Path(self.shown)
        above = shown.parent if shown.name not in {"", "..", "~"} else shown / ".."
        return LocalFolder(self.path.parent, self.fsync, str(above))

    @property
    def name(self) -> str:
        """What it is called in the folder that it lies in."""
        return self.path.name

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """List the keys below a prefix that is a folder, with their sizes in bytes, by directory scan."""
        return dict(_scan(str(self.path / prefix), prefix))

    def read(self, key: str) -> bytes | None:
        """Read a file whole; None where there is none."""
        try:
            return (self.path / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def size(self, key: str) -> int | None:
        """Say how many bytes a file has; None where there is none."""
        path = self.path / key
        try:
            return path.stat().st_size if path.is_file() else None
        except FileNotFoundError:
            return None

    def write(self, key: str, data: bytes) -> None:
        """Write a file, whole or not at all, and durably."""
        write_file(self.path / key, data, fsync=self.fsync)

    def remove(self, key: str) -> None:
        """Remove a file, if it is there."""
        (self.path / key).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove every file, and the folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    def zarr_store(self, *, read_only: bool) -> Store:
        """Open the folder for Zarr."""
        return DurableStore(self.path, read_only=read_only, fsync=self.fsync)

    def sweep(self, pattern: str = "*") -> None:
        """Remove what interrupted writes of files that match a pattern have left; only while no process writes."""
        for leftover in self.path.rglob(f"{pattern}{PARTIAL}") if pattern == "*" else self.path.glob(pattern + PARTIAL):
            leftover.unlink(missing_ok=True)

    @property
    def free_bytes(self) -> int | None:
        """The room that is left where the folder lies or would lie."""
        return int(psutil.disk_usage(str(self._nearest)).free)

    def require_writable(self) -> None:
        """Refuse a folder that cannot be written, or made.

        Raises:
            InputError: If there is a file at the path or above it, or no permission.
        """
        self.require_no_dangling_link()
        nearest = self._nearest
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise InputError(
                f"Nothing can be written below {nearest}: expected a folder with permission to write, found "
                f"{'one without' if nearest.is_dir() else 'a file'}. Is --out spelled right? Choose another."
            )

    def require_no_dangling_link(self) -> None:
        """Refuse a folder that is, or lies below, a symbolic link to nothing.

        Raises:
            InputError: If it does.
        """
        for place in (self.path, *self.path.parents):
            if place.is_symlink() and not place.exists():
                raise InputError(
                    f"Nothing can be written to {self}: expected a folder or nothing there, found {place}, a symbolic "
                    f"link to {os.readlink(place)}, which is not there. Was it moved, or its disk not mounted? Make "
                    "that folder, or remove the link."
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
        """Say whether it is there."""
        return self.folder.has(self.name)

    def require_writable(self) -> None:
        """Refuse a file that cannot be written.

        Raises:
            InputError: If there is a folder in its place, or its own folder cannot be written.
        """
        if isinstance(self.folder, LocalFolder) and (self.folder.path / self.name).is_dir():
            raise InputError(
                f"No file can be written to {self}: expected a file or nothing, found a folder. Was a name left out? "
                "Give the name of a file in it."
            )
        self.folder.require_writable()


def file_of(place: "File | str | os.PathLike[str]") -> File:
    """Turn a path into a file of a local folder."""
    if isinstance(place, File):
        return place
    folder = LocalFolder(Path(place))
    return File(folder.parent, folder.name)
