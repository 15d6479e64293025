"""Whether a disk has room for what is to be written."""

from ntkgen.errors import DiskSpaceError
from ntkgen.files.folder import Folder
from ntkgen.units import human_bytes


def require_room(folder: Folder, needed_bytes: int, what: str, advice: str) -> None:
    """Refuse to write what a disk has no room for. Of an object store the room is not known.

    Args:
        folder: Where it would be written.
        needed_bytes: Bytes of it, without those that are there already.
        what: What needs the room, for the error.
        advice: The likely cause, and what to do, for the error.

    Raises:
        DiskSpaceError: If there is too little room; the message has both numbers.
    """
    free = folder.free_bytes
    if free is not None and needed_bytes > free:
        raise DiskSpaceError(
            f"The disk at {folder} has no room for {what}: {human_bytes(needed_bytes)} are needed and "
            f"{human_bytes(free)} are free. {advice}"
        )
