"""Conversion of a path, a URL or a Zarr store to a folder."""

import os
from pathlib import Path

from zarr.abc.store import Store
from zarr.storage import LocalStore

from ntkgen.errors import InputError
from ntkgen.files.bucket import StoreFolder, bucket_folder, require_open
from ntkgen.files.folder import Folder, LocalFolder


def folder_of(place: "str | os.PathLike[str] | Store | Folder", *, fsync: bool = True) -> Folder:
    """Convert a path, a URL (s3://, gs://, az://, file://) or a Zarr store to a folder.

    Raises:
        InputError: If the argument has another type, the type of the URL is unknown, or a library is missing.
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
            f"There can be no results at {place!r}: expected a path, a URL or a Zarr store, found "
            f"{type(place).__name__}. Was an argument left out? Pass a path without null characters."
        )
    if os.fspath(place) == "":
        raise InputError(
            "There can be no results at an empty path: expected a path, a URL or a Zarr store, found no characters. Is "
            "a variable not set? Give a path. The current directory is a dot."
        )
    scheme, separator, rest = os.fspath(place).partition("://")
    if not separator or scheme == "file":
        return LocalFolder(Path(rest if separator else place), fsync)
    return bucket_folder(os.fspath(place))
