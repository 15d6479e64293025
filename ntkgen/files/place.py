"""A path, a URL or a Zarr store → the folder that it names."""

import os
from pathlib import Path

from zarr.abc.store import Store
from zarr.storage import LocalStore

from ntkgen.errors import InputError
from ntkgen.files.bucket import StoreFolder, bucket_folder, require_open
from ntkgen.files.folder import Folder, LocalFolder


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
        require_open(place)
        return StoreFolder(place, str(place))
    if not isinstance(place, str | os.PathLike) or "\0" in os.fspath(place):
        raise InputError(
            f"{place!r} is no place that results can be written to: expected a path, a URL or a Zarr store, found "
            f"{type(place).__name__}. Was an argument left out? Pass a path without null characters."
        )
    scheme, separator, rest = os.fspath(place).partition("://")
    if not separator or scheme == "file":
        return LocalFolder(Path(rest if separator else place), fsync)
    return bucket_folder(os.fspath(place))
