"""Processes that import the script that started them before they do their work.

A script that starts processes outside of ``if __name__ == "__main__":`` runs again in each of them, and reaches the
same call there. Such a process ends silently, and the process that started it reports the error.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ntkgen.errors import InputError

# The environment variable with the path of the file that a process creates when it reaches the same call again.
SIGN = "NTKGEN_STARTED_AGAIN"
ENDED = 3


@contextmanager
def starting_processes(folder: Path) -> Iterator[Callable[[], bool]]:
    """Start processes in this block. Yield a function that tells whether one of them reached the same call again.

    Args:
        folder: An empty folder for the file of such a process.
    """
    sign, before = folder / "again", os.environ.get(SIGN)
    os.environ[SIGN] = str(sign)
    try:
        yield sign.exists
    finally:
        if before is None:
            del os.environ[SIGN]
        else:
            os.environ[SIGN] = before


def require_main_guard() -> None:
    """End a process that is still importing the script that started it; silently, if its parent checks for the file.

    Raises:
        SystemExit: If the parent checks for the file.
        InputError: If no parent does.
    """
    if not getattr(multiprocessing.current_process(), "_inheriting", False):
        return
    if (sign := os.environ.get(SIGN)) is None:
        raise InputError(unguarded())
    Path(sign).touch()
    raise SystemExit(ENDED)


def unguarded() -> str:
    """Write the message about a script that starts processes outside of a main guard."""
    script = getattr(sys.modules["__main__"], "__file__", None) or "the script"
    return (
        f"The workers of {script} began to run it from its first line, and came to the same call: expected the call "
        'that starts workers under a line `if __name__ == "__main__":`, found it outside. Python starts a process by '
        "importing the script anew. Put what the script does under such a line."
    )


@contextmanager
def without_missing_script() -> Iterator[None]:
    """Let processes start in this block although the script is no file, for example because it came from stdin."""
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    if path is None or Path(path).is_file():
        yield
        return
    del main.__file__
    try:
        yield
    finally:
        main.__file__ = path
