"""Check that a disk has enough free space."""

from ntkgen.errors import DiskSpaceError
from ntkgen.files.folder import Folder
from ntkgen.units import human_bytes


def require_room(folder: Folder, needed_bytes: int, what: str, advice: str) -> None:
    """Require free disk space in a folder. An object store is not checked, because its free space is unknown.

    Args:
        folder: Folder to write to.
        needed_bytes: Number of bytes to write, without those that are stored already.
        what: Name of the data, for the error.
        advice: Likely cause and advice, for the error.

    Raises:
        DiskSpaceError: If the free space is too small. The message gives both numbers.
    """
    free = folder.free_bytes
    if free is not None and needed_bytes > free:
        raise DiskSpaceError(
            f"The disk at {folder} has no room for {what}: {human_bytes(needed_bytes)} are needed and "
            f"{human_bytes(free)} are free. {advice}"
        )
