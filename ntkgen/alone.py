"""One thread of this process computes at a time.

What makes a computation exact are switches of the whole process: gradients, the number of threads, how products round,
forward mode's levels, which warnings are shown. Two threads that set them, and set them back in another order, would
compute with each other's.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.RLock()


@contextmanager
def alone() -> Iterator[None]:
    """Wait until no other thread of this process is in such a block; a thread that is may enter another.

    A thread that writes tiles must not enter such a block: the thread that computes waits for it, and holds the lock.
    """
    with _LOCK:
        yield
