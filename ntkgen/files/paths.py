"""A path as a user writes it, and the file that it names: for good, wherever the process goes afterwards."""

import hashlib
import os
from pathlib import Path

from ntkgen.errors import InputError

# The longest name of a file on every usual file system.
NAME_BYTES = 255


def expanded(path: str | os.PathLike[str]) -> Path:
    """Put the user's home in the place of ``~``.

    Raises:
        InputError: If there is no such home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"The path {os.fspath(path)} begins with a home directory that is not known: expected one that HOME or the "
            "list of users names. Does this user, or the one named, have none? Give the whole path."
        ) from error


def absolute(path: str | os.PathLike[str]) -> Path:
    """Find what a path means now: ``~`` is the user's home, and a relative path lies below the current folder.

    Raises:
        InputError: If there is none of the two, or a name is too long for a file system.
    """
    path = expanded(path)
    try:
        found = path.resolve() if ".." in path.parts else path.absolute()
    except (RuntimeError, OSError) as error:  # a loop of links, no current folder
        raise InputError(
            f"The path {path} leads nowhere ({error}): expected one below a current folder that is there. Was that "
            "removed, or does a link lead to itself? Give an absolute path."
        ) from error
    for name in found.parts:
        if len(os.fsencode(name)) > NAME_BYTES:
            raise InputError(
                f"The name {name[:40]}… in a path is too long: expected at most {NAME_BYTES} bytes, found "
                f"{len(os.fsencode(name))}. Was something else than a path given? Choose a shorter name."
            )
    return found


def beside(path: Path, suffix: str) -> Path:
    """Name a file beside another: by its name and a suffix, or where that is too long, by its start and a hash.

    >>> beside(Path("runs/k.zarr"), ".lock").name
    'k.zarr.lock'
    >>> beside(Path("runs") / ("k" * 251), ".lock").name[-18:]
    'kkkk-3b8059c6.lock'

    Raises:
        InputError: If it is the root of the file system, which nothing lies beside.
    """
    if not path.name:
        raise InputError(
            f"Nothing can be written to {path}: expected a folder, found the root of a file system. Is the path "
            "spelled right? Choose a folder below it."
        )
    whole = path.name + suffix
    if len(os.fsencode(whole)) <= NAME_BYTES:
        return path.with_name(whole)
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]
    start = os.fsencode(path.name)[: NAME_BYTES - len(suffix) - 9].decode(errors="ignore")
    return path.with_name(f"{start}-{digest}{suffix}")
