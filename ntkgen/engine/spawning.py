"""Detection of scripts that start worker processes without a main guard.

Each worker process first imports the script that started it. If the script starts workers outside of
``if __name__ == "__main__":``, each worker runs the script again and makes the same call. Such a worker ends without a
message, and the process that started it reports the error.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ntkgen.errors import InputError

# Environment variable with the path of the file that a process creates when it makes the same call again.
SIGN = "NTKGEN_STARTED_AGAIN"
# Exit code of such a process.
ENDED = 3


@contextmanager
def starting_processes(folder: Path) -> Iterator[Callable[[], bool]]:
    """Start processes in this block. Yield a function that tells whether one of them made the same call again.

    Args:
        folder: Empty folder for the file that such a process creates.
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
    """End this process if it is still importing the script that started it.

    Raises:
        SystemExit: If the parent process checks for the file `SIGN`, and reports the error itself.
        InputError: If the parent process does not check.
    """
    if not getattr(multiprocessing.current_process(), "_inheriting", False):
        return
    if (sign := os.environ.get(SIGN)) is None:
        raise InputError(unguarded())
    Path(sign).touch()
    raise SystemExit(ENDED)


def unguarded() -> str:
    """Return the message about a script that starts processes outside of a main guard."""
    script = getattr(sys.modules["__main__"], "__file__", None) or "the script"
    return (
        f"The workers of {script} began to run it from its first line, and made the same call: expected the call that "
        'starts workers under a line `if __name__ == "__main__":`, found it outside. Python imports the script again '
        "in each process that it starts. Put the statements of the script under such a line."
    )


@contextmanager
def without_missing_script() -> Iterator[None]:
    """Allow processes to start in this block even if the script is not a file, for example if it came from stdin."""
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
