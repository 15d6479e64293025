"""Conversion of a user's path to an absolute path, which a later change of the current directory does not affect."""

import hashlib
import os
from pathlib import Path

from ntkgen.errors import InputError

# Maximum length of a file name in bytes on common file systems.
NAME_BYTES = 255


def expanded(path: str | os.PathLike[str]) -> Path:
    """Replace ``~`` by the user's home directory.

    Raises:
        InputError: If the home directory is not known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"The path {os.fspath(path)} begins with a home directory that is not known: expected the environment "
            "variable HOME or an entry in the list of users. Is the user name misspelt, or has the user no home "
            "directory? Give the whole path."
        ) from error


def absolute(path: str | os.PathLike[str]) -> Path:
    """Make a path absolute, relative to the current directory. ``~`` is the user's home directory.

    Raises:
        InputError: If the home or the current directory is not known, or a name is too long for a file system.
    """
    path = expanded(path)
    try:
        found = path.resolve() if ".." in path.parts else path.absolute()
    except (RuntimeError, OSError) as error:  # a loop of links, or a deleted current directory
        raise InputError(
            f"The path {path} cannot be resolved ({error}): expected a current directory that exists, and links "
            "without a loop. Was the directory removed, or does a link refer to itself? Give an absolute path."
        ) from error
    for name in found.parts:
        if len(os.fsencode(name)) > NAME_BYTES:
            raise InputError(
                f"The name {name[:40]}… in a path is too long: expected at most {NAME_BYTES} bytes, found "
                f"{len(os.fsencode(name))}. Is the argument not a path? Choose a shorter name."
            )
    return found


def beside(path: Path, suffix: str) -> Path:
    """Append a suffix to the name of a path. A name that is too long is replaced by its start and a hash.

    >>> beside(Path("runs/k.zarr"), ".lock").name
    'k.zarr.lock'
    >>> beside(Path("runs") / ("k" * 251), ".lock").name[-18:]
    'kkkk-3b8059c6.lock'

    Raises:
        InputError: If the path is the root of the file system, which has no name.
    """
    if not path.name:
        raise InputError(
            f"Nothing can be written to {path}: expected a folder, found the root of a file system. Is the path "
            "misspelt? Choose a folder below the root."
        )
    whole = path.name + suffix
    if len(os.fsencode(whole)) <= NAME_BYTES:
        return path.with_name(whole)
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]
    start = os.fsencode(path.name)[: NAME_BYTES - len(suffix) - 9].decode(errors="ignore")
    return path.with_name(f"{start}-{digest}{suffix}")
