"""How long work tells how far it has come."""

from collections.abc import Callable
from typing import Protocol

# Called after each piece of work.
Step = Callable[[], None]


class Report(Protocol):
    """Called as a stage proceeds, with a note to be shown.

    The stages are ``training``, ``diagonal``, ``tiles``, of the certificate ``stored product``, ``exact product`` and
    ``pairs``, of a verification ``files`` and ``recomputed``; ``mirrored``, ``imported``; and those of analysis, each
    named after what it counts. `ntkgen.cli.progress` has the unit of each.
    """

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Tell how far a stage has come."""


def ignore_report(stage: str, done: int, total: int, note: str = "") -> None:
    """Report nothing."""


def ignore_step() -> None:
    """Count nothing."""


def counter(report: Report, stage: str, done: int, total: int) -> Step:
    """Make a function that counts what is done of a stage, and reports it; now, and with each call.

    What is done again, after all was done, counts no further.

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
