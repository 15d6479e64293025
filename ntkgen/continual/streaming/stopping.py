"""Ctrl-C and SIGTERM that act between two samples, so that everything learnt so far can be kept."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Stop:
    """Whether a signal has asked the process to stop, and which one."""

    number: int | None = None

    def __call__(self) -> bool:
        """Say whether there was a signal."""
        return self.number is not None


@contextmanager
def held_back_signals() -> Iterator[Stop]:
    """Hold back the first Ctrl-C or SIGTERM until the end of the block, where it acts as usual. A second acts at once.

    Only the main thread gets signals. A signal that Python does not handle is left alone.
    """
    stop = Stop()
    handlers: dict[int, Callable[[int, FrameType | None], object]] = {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in SIGNALS}
        handlers = {number: handler for number, handler in found.items() if callable(handler)}

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def hold(number: int, frame: FrameType | None) -> None:
        if stop():
            restore()
            handlers[number](number, frame)
        stop.number = number

    for number in handlers:
        signal.signal(number, hold)
    try:
        yield stop
    finally:
        restore()
    if stop.number is not None:
        handlers[stop.number](stop.number, None)
