"""A folder in an object store, given by a URL, or in any Zarr store."""

import asyncio
import zipfile
from dataclasses import dataclass

from zarr.abc.store import Store
from zarr.core.buffer.core import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import ObjectStore

from ntkgen.errors import InputError
from ntkgen.files.folder import Folder

# Maximum number of concurrent requests to an object store.
REQUESTS = 32
# Name of the file that is written and removed to check the permission to write.
TRIAL = ".ntkgen-can-write"
# Maximum length of a library's message within an error message.
MESSAGE_LENGTH = 300


@dataclass(frozen=True)
class StoreFolder(Folder):
    """A folder of an object store, given by its URL, or any Zarr store of a caller, which has no parent folder."""

    store: Store
    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Folder:
        return bucket_folder(f"{self.url}/{name}")

    @property
    def parent(self) -> Folder:
        """The folder that contains this one.

        Raises:
            InputError: If this folder is a whole bucket, or a Zarr store of a caller.
        """
        above, kind = self.url.rpartition("/")[0], type(self.store).__name__
        is_bucket = above.endswith(":/")
        if is_bucket or not isinstance(self.store, ObjectStore):
            raise InputError(
                f"{self} has no parent folder: expected a folder or the URL of a folder in a bucket, found a "
                f"{'whole bucket' if is_bucket else kind}. Is it meant only for reading? Give the path of a folder."
            )
        return bucket_folder(above)

    @property
    def name(self) -> str:
        """The name of this folder in its parent folder."""
        return self.url.rpartition("/")[2]

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """List the keys in a folder, given as prefix, with their sizes in bytes."""
        return sync(_remote_sizes(self.store, prefix))

    def read(self, key: str) -> bytes | None:
        """Read a whole file. Return None if it does not exist."""
        buffer = sync(self.store.get(key, default_buffer_prototype()))
        return None if buffer is None else buffer.to_bytes()

    def size(self, key: str) -> int | None:
        """Return the size of a file in bytes, or None if it does not exist."""
        try:
            return sync(self.store.getsize(key))
        except FileNotFoundError:
            return None

    def write(self, key: str, data: bytes) -> None:
        """Write a file atomically."""
        self._require_replaceable()
        sync(self.store.set(key, default_buffer_prototype().buffer.from_bytes(data)))

    def remove(self, key: str) -> None:
        """Remove a file if it exists."""
        sync(self.store.delete(key))

    def require_writable(self) -> None:
        """Refuse a folder that cannot be written, by writing and removing a small file.

        Raises:
            InputError: If the file cannot be written.
        """
        try:
            self.write(TRIAL, b"")
            self.remove(TRIAL)
        except Exception as error:
            if not is_remote_error(error):
                raise
            raise InputError(
                f"Nothing can be written to {self} ({first_lines(error)}): expected a server that answers, a bucket "
                "that exists, and permission to write to it. Are credentials or the bucket's name wrong? For S3, set "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. For a server other than Amazon's, also set "
                "AWS_ENDPOINT_URL (and AWS_ALLOW_HTTP=true if it uses http)."
            ) from error

    def zarr_store(self, *, read_only: bool) -> Store:
        """Open the folder for Zarr.

        Raises:
            InputError: If a Zarr store of a caller cannot be opened in this mode.
        """
        if not read_only:
            self._require_replaceable()
        if read_only == self.store.read_only:
            return self.store
        try:
            return self.store.with_read_only(read_only)
        except NotImplementedError:
            raise InputError(
                f"The {type(self.store).__name__} {self} cannot be opened again for "
                f"{'reading' if read_only else 'writing'}: expected read_only={read_only}, found "
                f"read_only={self.store.read_only}. Was it opened for another purpose? Open it as "
                f"{type(self.store).__name__}(…, read_only={read_only})."
            ) from None

    def _require_replaceable(self) -> None:
        """Refuse a store whose files cannot be replaced, such as a zip file.

        Raises:
            InputError: If files cannot be replaced.
        """
        if not self.store.supports_deletes:
            raise InputError(
                f"A kernel cannot be computed into {self}: expected a store whose files can be replaced, found a "
                f"{type(self.store).__name__}, which only grows. Is it meant for reading, as a kernel in a zip file? "
                "Compute into a folder, then pack the folder."
            )


async def _remote_sizes(store: Store, prefix: str) -> dict[str, int]:
    """List keys and sizes. The listing of an object store has both. Other stores are asked for each size."""
    below = f"{prefix.rstrip('/')}/" if prefix else ""
    if isinstance(store, ObjectStore):
        import obstore

        batches = [batch async for batch in obstore.list(store.store, prefix=below or None)]
        return {item["path"]: item["size"] for batch in batches for item in batch}
    keys = [key async for key in store.list_prefix(below)]
    limit = asyncio.Semaphore(REQUESTS)

    async def size(key: str) -> int:
        async with limit:
            return await store.getsize(key)

    return dict(zip(keys, await asyncio.gather(*map(size, keys)), strict=True))


def require_open(store: Store) -> None:
    """Open a store if it is not open yet, such as a new `ZipStore`. Not all methods of Zarr do this themselves.

    Raises:
        InputError: If the store cannot be opened.
    """
    try:
        sync(store._ensure_open())
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(
            f"The {type(store).__name__} {store} cannot be opened ({first_lines(error)}): expected an existing store "
            "of this type. Is its path wrong, or its file incomplete? Correct the path, or copy the file again."
        ) from error


def bucket_folder(url: str) -> StoreFolder:
    """Return the folder of an object store at a URL (s3://, gs://, az://).

    Raises:
        InputError: If the type of the URL is unknown, or a library or a setting is missing.
    """
    url, scheme = url.rstrip("/"), url.partition("://")[0]
    if scheme not in {"s3", "gs", "az"}:
        raise InputError(
            f"Results cannot be written to {url}: expected a folder, or a URL that begins with s3://, gs:// or az://, "
            f"found {scheme}://. Is the URL misspelt? Correct it, or give the path of a folder."
        )
    try:
        from obstore.store import from_url
    except ImportError:
        raise InputError(
            f"{url} is in an object store: expected the library obstore, found that it is not installed. Was ntkgen "
            "installed without its optional dependencies? Run pip install 'ntkgen[cloud]'."
        ) from None
    try:
        return StoreFolder(ObjectStore(from_url(url)), url)
    except Exception as error:
        if not is_remote_error(error):
            raise
        raise InputError(
            f"{url} is not a valid URL of an object store ({first_lines(error)}): expected {scheme}://BUCKET/FOLDER "
            "and the necessary environment variables. Is the name of the bucket missing, or for az:// that of the "
            "account? Add the name of the bucket, or set AZURE_STORAGE_ACCOUNT_NAME."
        ) from error


def is_remote_error(error: BaseException) -> bool:
    """Return whether an error comes from an object store, such as a missing connection, permission or bucket."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] == "obstore"


def first_lines(error: BaseException) -> str:
    """Format an error on one line, without the details that some libraries add after an empty line."""
    text = " ".join(str(error).partition("\n\n")[0].split()) or type(error).__name__
    return text if len(text) <= MESSAGE_LENGTH else f"{text[:MESSAGE_LENGTH]}…"
