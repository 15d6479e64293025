"""A folder in an object store, named by a URL, or in any Zarr store."""

import asyncio
import zipfile
from dataclasses import dataclass

from zarr.abc.store import Store
from zarr.core.buffer.core import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import ObjectStore

from ntkgen.errors import InputError
from ntkgen.files.folder import Folder

# Requests to an object store at a time.
REQUESTS = 32
# What is written, and removed, to see whether anything can be.
TRIAL = ".ntkgen-can-write"
# Maximum length of a library's message that is repeated in ours.
MESSAGE_LENGTH = 300


@dataclass(frozen=True)
class StoreFolder(Folder):
    """A folder of an object store, named by its URL; or any Zarr store that a caller brings, which lies in no other."""

    store: Store
    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Folder:
        return bucket_folder(f"{self.url}/{name}")

    @property
    def parent(self) -> Folder:
        """The folder that this one lies in.

        Raises:
            InputError: If it is a whole bucket, or a Zarr store that a caller has brought.
        """
        above, kind = self.url.rpartition("/")[0], type(self.store).__name__
        is_bucket = above.endswith(":/")
        if is_bucket or not isinstance(self.store, ObjectStore):
            raise InputError(
                f"Nothing lies beside {self}: expected a folder or the URL of a folder in a bucket, found a "
                f"{'whole bucket' if is_bucket else kind}. Was it to be read alone? Give the path of a folder."
            )
        return bucket_folder(above)

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


def require_open(store: Store) -> None:
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


def bucket_folder(url: str) -> StoreFolder:
    """Name a folder of an object store by its URL (s3://, gs://, az://).

    Raises:
        InputError: If the URL is of a kind that is not known, or what it needs is not there.
    """
    url, scheme = url.rstrip("/"), url.partition("://")[0]
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
