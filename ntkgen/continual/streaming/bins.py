"""Bins of a stream: the samples over which measures are averaged."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ntkgen.units import counted

TASKS, PUBLISHED = "tasks", "published"
KINDS = (TASKS, PUBLISHED)


def bin_ends(num_samples: int, period: int, kind: str = TASKS) -> list[int]:
    """List the position in the stream after the last sample of each bin. Every sample is in one bin.

    Args:
        num_samples: Number of samples of the stream.
        period: Number of samples of a task.
        kind: ``tasks``: a bin is a task; ``published``: as in published code, the first bin is the first sample, each
            later one ends one sample after a task begins, and what is left at the end is in no bin.

    >>> bin_ends(10, 4), bin_ends(8, 4), bin_ends(10, 4, "published"), bin_ends(9, 4, "published")
    ([4, 8, 10], [4, 8], [1, 5, 9], [1, 5, 9])
    """
    if kind == PUBLISHED:
        return list(range(1, num_samples + 1, period))
    return [*range(period, num_samples, period), num_samples]


def whole_bins(num_samples: int, period: int, kind: str = TASKS) -> list[bool]:
    """Say of each bin whether scores count it: all but the last one of a task that the stream does not finish.

    If that is the only one, scores count it. Published bins count all, as in published code.

    >>> whole_bins(10, 4), whole_bins(8, 4), whole_bins(3, 4), whole_bins(9, 4, "published")
    ([True, True, False], [True, True], [True], [True, True, True])
    """
    count = len(bin_ends(num_samples, period, kind))
    is_cut = kind == TASKS and num_samples % period > 0 and count > 1
    return [True] * (count - is_cut) + [False] * is_cut


def drawn_bins(num_samples: int, period: int, kind: str, recorded: int) -> list[bool]:
    """Say of each recorded bin whether pictures draw it: all that have the samples of a whole task.

    If there is no such bin, pictures draw all.

    >>> drawn_bins(10, 4, "tasks", 3), drawn_bins(10, 4, "tasks", 2), drawn_bins(3, 4, "tasks", 1)
    ([True, True, False], [True, True], [True])
    >>> drawn_bins(9, 4, "published", 3), drawn_bins(9, 4, "published", 1)
    ([False, True, True], [True])
    """
    found = whole_bins(num_samples, period, kind)[:recorded]
    if kind == PUBLISHED and period > 1:
        found[:1] = [False] * len(found[:1])
    return found if any(found) else [True] * len(found)


def notes_on_bins(num_samples: int, period: int, kind: str = TASKS) -> list[str]:
    """Say which samples are in no bin, or in a bin that is no whole task.

    >>> notes_on_bins(8, 4), notes_on_bins(10, 4)
    ([], ['the last task has 2 of 4 samples; it is recorded, but scores leave it out'])
    >>> notes_on_bins(3, 4)
    ['the only task has 3 of 4 samples']
    >>> notes_on_bins(10, 4, "published")
    ['the first bin is a single sample, as published; no bin has the last 1 sample']
    """
    if kind == PUBLISHED:
        left = num_samples - bin_ends(num_samples, period, kind)[-1]
        rest = f"; no bin has the last {counted(left, 'sample')}" if left else ""
        return [f"the first bin is a single sample, as published{rest}"]
    if not num_samples % period:
        return []
    size = f"has {num_samples % period:,} of {period:,} samples"
    is_only = num_samples < period
    return [f"the only task {size}" if is_only else f"the last task {size}; it is recorded, but scores leave it out"]


def measured_samples(start: int, stop: int, every: int, ends: Sequence[int]) -> list[int]:
    """List the samples after which norms and ranks are measured, among some samples of one bin.

    These are every few samples of the stream, and the last sample of a bin that has none of them. So each bin has one,
    wherever blocks of samples end.

    Args:
        start: Position of the first sample.
        stop: Position after the last sample.
        every: Number of samples between two measurements.
        ends: Position after the last sample of each bin.

    >>> measured_samples(0, 4, 6, [4, 8, 12]), measured_samples(4, 8, 6, [4, 8, 12])
    ([0], [6])
    >>> measured_samples(8, 10, 6, [4, 8, 12]), measured_samples(10, 12, 6, [4, 8, 12])
    ([], [11])
    """
    found = list(range(start + -start % every, stop, every))
    index = bisect_right(ends, start)
    if index < len(ends) and ends[index] == stop:
        begin = ends[index - 1] if index else 0
        if begin + -begin % every >= stop:
            found.append(stop - 1)
    return found


class Sums:
    """Sums of measures since the last bin has ended, added up one step after the other.

    The order of additions does not depend on when blocks end, so a resumed run has the same bytes.

    Attributes:
        sums: Sum of each measure, (members,).
        counts: Number of steps in which each measure was taken.
    """

    def __init__(self, names: list[str], num_members: int) -> None:
        self.sums = {name: np.zeros(num_members) for name in names}
        self.counts = dict.fromkeys(names, 0)

    def add(self, name: str, values: npt.NDArray[Any]) -> None:  # (steps, members)
        """Add the values of some steps."""
        for row in np.asarray(values, np.float64):
            self.sums[name] += row
        self.counts[name] += len(values)

    def means(self) -> dict[str, npt.NDArray[np.float64]]:
        """Compute the mean of each measure, and begin anew. A measure that was not taken has NaN."""
        found = {}
        for name, total in self.sums.items():
            count = self.counts[name]
            found[name] = total / count if count else np.full_like(total, np.nan)
            self.sums[name], self.counts[name] = np.zeros_like(total), 0
        return found
