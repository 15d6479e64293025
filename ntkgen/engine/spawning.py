"""Processes that are started afresh: each imports the script that started it before it does its work.

A script that starts processes outside of ``if __name__ == "__main__":`` is thereby run again in each of them, and comes
to the same call there. Such a process ends without a word, and the one that started it says what is wrong.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ntkgen.errors import InputError

# The environment variable that names the file by which a process says that it came to the same call again.
SIGN = "NTKGEN_STARTED_AGAIN"
ENDED = 3


@contextmanager
def starting_processes(folder: Path) -> Iterator[Callable[[], bool]]:
    """Start processes in this block; yield what says whether one of them has come to the same call again.

    Args:
        folder: An empty one, for them to say so.
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
    """Leave a process that is still importing the script that started it, quietly if that is waiting for a sign.

    Raises:
        SystemExit: If it is.
        InputError: If nobody waits for a sign.
    """
    if not getattr(multiprocessing.current_process(), "_inheriting", False):
        return
    if (sign := os.environ.get(SIGN)) is None:
        raise InputError(unguarded())
    Path(sign).touch()
    raise SystemExit(ENDED)


def unguarded() -> str:
    """Say that a script starts processes where each of them does so too."""
    script = getattr(sys.modules["__main__"], "__file__", None) or "the script"
    return (
        f"The workers of {script} began to run it from its first line, and came to the same call: expected the call "
        'that starts workers under a line `if __name__ == "__main__":`, found it outside. Python starts a process by '
        "importing the script anew. Put what the script does under such a line."
    )


@contextmanager
def without_missing_script() -> Iterator[None]:
    """Let processes start in this block that would look for a script that is no file, as one that came from stdin."""
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
