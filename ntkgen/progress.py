"""Progress reports of long computations."""

from collections.abc import Callable
from typing import Protocol

# Called after each piece of work.
Step = Callable[[], None]


class Report(Protocol):
    """Called as a stage proceeds, with a note to display.

    The stages of a computation are ``training``, ``diagonal`` and ``tiles``. A certificate, which is the measured error
    bound of a kernel, has the stage ``stored product``, and then ``exact rows``, or ``exact product`` and ``pairs``. A
    verification has ``files`` and ``recomputed``. Other stages are ``mirrored`` and ``imported``. A stage of the
    analysis is named after the items that it counts. `ntkgen.cli.progress` has the unit of each stage.
    """

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Report the progress of a stage."""


def ignore_report(stage: str, done: int, total: int, note: str = "") -> None:
    """Ignore a progress report."""


def ignore_step() -> None:
    """Ignore a step."""


def counter(report: Report, stage: str, done: int, total: int) -> Step:
    """Return a function that counts the finished items of a stage. The count is reported now and after each call.

    The count never exceeds the total, even if items are repeated.

    >>> step = counter(lambda stage, done, total: print(stage, done, total), "tiles", 3, 5)
    tiles 3 5
    >>> step()
    tiles 4 5
    """
    report(stage, done, total)

    def step() -> None:
        nonlocal done
        done = min(done + 1, total)
        report(stage, done, total)

    return step
