"""A folder of results, on a disk or in an object store, and one set of verbs for both.

What is written is durable before it is seen: `ntkgen.files.durable` says how for a disk, and an object store
acknowledges an object when it is safe.
"""

import asyncio
import contextlib
import os
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from zarr.abc.store import Store
from zarr.core.buffer.core import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore, ObjectStore

from ntkgen.errors import InputError
from ntkgen.files import paths
from ntkgen.files.durable import PARTIAL, DurableStore, write_file

# Requests to an object store at a time.
REQUESTS = 32
# What is written, and removed, to see whether anything can be.
TRIAL = ".ntkgen-can-write"
# So much of a library's message is repeated in ours.
MESSAGE_LENGTH = 300


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
        """Remove what interrupted writes have left behind, of files that match a pattern; only while nobody writes."""
        return

    def clear(self) -> None:
        """Remove every file."""
        for key in self.sizes():
            self.remove(key)

    @property
    def free_bytes(self) -> int | None:
        """The room that is left; None where nobody knows."""
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
        """Remove what interrupted writes have left behind, of files that match a pattern; only while nobody writes."""
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


@dataclass(frozen=True)
class StoreFolder(Folder):
    """A folder of an object store, named by its URL; or any Zarr store that a caller brings, which lies in no other."""

    store: Store
    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Folder:
        return folder_of(f"{self.url}/{name}")

    @property
    def parent(self) -> Folder:
        """The folder that this one lies in.

        Raises:
            InputError: If it is a Zarr store that a caller has brought.
        """
        if not isinstance(self.store, ObjectStore):
            raise InputError(
                f"Nothing lies beside {self}: expected a folder or a URL, found a {type(self.store).__name__}. Was it "
                "to be read alone? Give the path of a folder."
            )
        return folder_of(self.url.rpartition("/")[0])

    @property
    def name(self) -> str:
        """What it is called in the folder that it lies in."""
        return self.url.rpartition("/")[2]

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """List the keys below a prefix that is a folder, with their sizes in bytes."""
        return sync(_remote_sizes(self.store, prefix))

    def read(self, key: str) -> bytes | None:
        """Read a file whole; None where there is none."""
        buffer = sync(self.store.get(key, default_buffer_prototype()))
        return None if buffer is None else buffer.to_bytes()

    def size(self, key: str) -> int | None:
        """Say how many bytes a file has; None where there is none."""
        try:
            return sync(self.store.getsize(key))
        except FileNotFoundError:
            return None

    def write(self, key: str, data: bytes) -> None:
        """Write a file, whole or not at all."""
        self._require_replaceable()
        sync(self.store.set(key, default_buffer_prototype().buffer.from_bytes(data)))

    def remove(self, key: str) -> None:
        """Remove a file, if it is there."""
        sync(self.store.delete(key))

    def require_writable(self) -> None:
        """Refuse a folder that cannot be written, by trying.

        Raises:
            InputError: If that fails.
        """
        try:
            self.write(TRIAL, b"")
            self.remove(TRIAL)
        except Exception as error:
            if not is_remote_error(error):
                raise
            raise InputError(
                f"Nothing can be written to {self} ({first_lines(error)}): expected a server that answers, a bucket "
                "that exists, and the right to write to it. Are the credentials set, for S3 AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, and for another server than Amazon's AWS_ENDPOINT_URL (with "
                "AWS_ALLOW_HTTP=true where that is http)? Is the bucket's name right?"
            ) from error

    def zarr_store(self, *, read_only: bool) -> Store:
        """Open the folder for Zarr.

        Raises:
            InputError: If a store that a caller has brought cannot be opened in that way.
        """
        if not read_only:
            self._require_replaceable()
        if read_only == self.store.read_only:
            return self.store
        try:
            return self.store.with_read_only(read_only)
        except NotImplementedError:
            raise InputError(
                f"The {type(self.store).__name__} {self} cannot be opened for {'reading' if read_only else 'writing'} "
                f"alone: expected one that is, found read_only={self.store.read_only}. Open it so, as "
                f"{type(self.store).__name__}(…, read_only={read_only})."
            ) from None

    def _require_replaceable(self) -> None:
        """Refuse to write where nothing that is written can be changed, as in a zip file.

        Raises:
            InputError: If it is so.
        """
        if not self.store.supports_deletes:
            raise InputError(
                f"A kernel cannot be computed into {self}: expected a store whose files can be replaced, found a "
                f"{type(self.store).__name__}, which only grows. Compute into a folder, then pack that: a kernel in a "
                "zip file can be read."
            )


def _scan(folder: str, prefix: str) -> Iterator[tuple[str, int]]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            key = f"{prefix}/{entry.name}" if prefix else entry.name
            if entry.is_dir():
                yield from _scan(entry.path, key)
            elif not entry.name.endswith(PARTIAL):
                with contextlib.suppress(FileNotFoundError):
                    yield key, entry.stat().st_size


async def _remote_sizes(store: Store, prefix: str) -> dict[str, int]:
    """List keys and sizes: of an object store, whose listing has both; of others, key by key."""
    below = f"{prefix.rstrip('/')}/" if prefix else ""
    if isinstance(store, ObjectStore):
        import obstore

        batches = [batch async for batch in obstore.list(store.store, prefix=below or None)]
        return {item["path"]: item["size"] for batch in batches for item in batch}
    keys = [key async for key in store.list_prefix(below)]
    room = asyncio.Semaphore(REQUESTS)

    async def size(key: str) -> int:
        async with room:
            return await store.getsize(key)

    return dict(zip(keys, await asyncio.gather(*map(size, keys)), strict=True))


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


def folder_of(place: "str | os.PathLike[str] | Store | Folder", *, fsync: bool = True) -> Folder:
    """Turn a path, a URL (s3://, gs://, az://, file://) or a Zarr store into a folder.

    Raises:
        InputError: If it is none of these, if the URL is of a kind that is not known, or what it needs is not there.
    """
    if isinstance(place, Folder):
        return place
    if isinstance(place, LocalStore):
        return LocalFolder(Path(place.root), fsync)
    if isinstance(place, Store):
        _open(place)
        return StoreFolder(place, str(place))
    if not isinstance(place, str | os.PathLike) or "\0" in os.fspath(place):
        raise InputError(
            f"{place!r} is no place that results can be written to: expected a path, a URL or a Zarr store, found "
            f"{type(place).__name__}. Was an argument left out? Pass a path without null characters."
        )
    scheme, separator, rest = os.fspath(place).partition("://")
    if not separator or scheme == "file":
        return LocalFolder(Path(rest if separator else place), fsync)
    return _object_folder(os.fspath(place).rstrip("/"), scheme)


def _open(store: Store) -> None:
    """Open a store that is not, as `ZipStore` is until then; Zarr does so itself, but not for each of its methods.

    Raises:
        InputError: If it cannot be opened.
    """
    try:
        sync(store._ensure_open())
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(
            f"The {type(store).__name__} {store} cannot be opened ({first_lines(error)}): expected a store that is "
            "there and of that kind. Is its path right, and its file whole?"
        ) from error


def _object_folder(url: str, scheme: str) -> Folder:
    if scheme not in {"s3", "gs", "az"}:
        raise InputError(
            f"{url} is no place that results can be written to: expected a folder, or a URL that begins with s3://, "
            f"gs:// or az://, found {scheme}://. Is it misspelt?"
        )
    try:
        from obstore.store import from_url
    except ImportError:
        raise InputError(
            f"{url} lies in an object store, and the library for these is not installed (expected obstore). It comes "
            "with an optional part of this package: pip install 'ntkgen[cloud]'."
        ) from None
    try:
        return StoreFolder(ObjectStore(from_url(url)), url)
    except Exception as error:
        if not is_remote_error(error):
            raise
        raise InputError(
            f"{url} names no place in an object store ({first_lines(error)}): expected {scheme}://BUCKET/FOLDER and "
            "the settings that it needs in the environment. Is the bucket's name missing, or for az:// the account's "
            "(AZURE_STORAGE_ACCOUNT_NAME)?"
        ) from error


def is_remote_error(error: BaseException) -> bool:
    """Say whether an error is one of an object store: no connection, no right, no bucket."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] == "obstore"


def first_lines(error: BaseException) -> str:
    """Write an error in one line, without the details that some libraries put below an empty one."""
    text = " ".join(str(error).partition("\n\n")[0].split()) or type(error).__name__
    return text if len(text) <= MESSAGE_LENGTH else f"{text[:MESSAGE_LENGTH]}…"
