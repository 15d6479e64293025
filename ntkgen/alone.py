"""A lock of this process, so that only one thread computes at a time.

An exact computation changes settings of the whole process: gradient mode, number of threads, rounding of matrix
products, levels of forward-mode differentiation, and warning filters. If two threads changed and restored these
settings in different orders, each could compute with the settings of the other.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.RLock()


@contextmanager
def alone() -> Iterator[None]:
    """Wait until no other thread of this process is in such a block. A thread may enter such blocks repeatedly.

    A thread that writes tiles must not enter such a block, because the computing thread holds the lock while it waits
    for the writing thread.
    """
    with _LOCK:
        yield
