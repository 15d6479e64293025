"""Streams of single samples whose labels or pixels are permuted anew for every task.

A task is a number of samples in a row. With each task, the labels of all classes or the pixels of all images are
permuted. The learner sees each sample once, and it is not told when the task changes. Each permutation and each sample
is a function of the seed, the task and the position, so a stream can be continued at any sample.

References:
    Elsayed, Mahmood (2024), Addressing loss of plasticity and catastrophic forgetting in continual learning, ICLR,
    arXiv:2404.00781, Sections 4 and 5; Dohare et al. (2024), Nature 632, for pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ntkgen.continual.chance import generator_of
from ntkgen.continual.streams.tasks import IntArray
from ntkgen.errors import InputError, UnknownNameError

LABELS, PIXELS = "label-permuted", "input-permuted"
STREAMS = (LABELS, PIXELS)
# Samples of a task, and whether a permutation is applied to the permuted data of the task before, as published.
SAMPLES_PER_TASK = {LABELS: 2500, PIXELS: 5000}
COMPOUNDING = {LABELS: True, PIXELS: False}


@dataclass(frozen=True)
class PermutedStreamSettings:
    """Settings of a permuted stream.

    Attributes:
        stream: ``label-permuted`` or ``input-permuted``.
        samples_per_task: Number of samples between two changes; None for 2,500 with labels and 5,000 with pixels.
        compounding: Whether a permutation is applied to what the last one has made, or to the original labels or
            pixels; None for compounding labels and original pixels, as published. Both give permutations that are
            uniformly random.
    """

    stream: str = LABELS
    samples_per_task: int | None = None
    compounding: bool | None = None

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            UnknownNameError: If there is no such stream.
            InputError: If a task has no samples.
        """
        if self.stream not in STREAMS:
            raise UnknownNameError("`stream`", self.stream, STREAMS)
        if self.samples_per_task is not None and self.samples_per_task < 1:
            raise InputError(
                f"`samples_per_task` is {self.samples_per_task}: expected a number above 0. Is the sign wrong? Give "
                "another number, or leave it out."
            )

    @property
    def period(self) -> int:
        """Number of samples of a task."""
        return self.samples_per_task or SAMPLES_PER_TASK[self.stream]

    @property
    def is_compounding(self) -> bool:
        """Whether each permutation is applied to what the last one has made."""
        return COMPOUNDING[self.stream] if self.compounding is None else self.compounding


@dataclass(frozen=True)
class Segment:
    """Samples in a row that belong to one task.

    Attributes:
        task: The task.
        start: Position of the first sample in the stream.
        ids: Positions of the samples in the data set.
    """

    task: int
    start: int
    ids: IntArray

    @property
    def stop(self) -> int:
        """Position in the stream after the last sample."""
        return self.start + len(self.ids)


class PermutedStream:
    """The stream of a seed.

    Args:
        settings: The settings.
        labels: Label of each sample of the data set, from 0.
        num_pixels: Number of values of a sample.
        seed: The seed of the run.

    >>> stream = PermutedStream(PermutedStreamSettings(samples_per_task=4), np.arange(6) % 3, 5, seed=0)
    >>> [(part.task, part.start, len(part.ids)) for part in stream.segments(2, 9)]
    [(0, 2, 2), (1, 4, 4), (2, 8, 1)]
    >>> sorted(stream.label_map(1).tolist()), stream.pixel_map(1) is None
    ([0, 1, 2], True)
    """

    def __init__(self, settings: PermutedStreamSettings, labels: IntArray, num_pixels: int, seed: int) -> None:
        self.settings = settings
        self.labels = labels
        self.num_classes = int(labels.max()) + 1
        self.num_pixels = num_pixels
        self.seed = seed
        self._permutation = lru_cache(maxsize=2)(self._find_permutation)
        self._task_ids = lru_cache(maxsize=2)(self._find_task_ids)
        self._newest: tuple[int, IntArray] | None = None

    def segments(self, start: int, stop: int) -> Iterator[Segment]:
        """List the samples from ``start`` to before ``stop``, task by task."""
        period = self.settings.period
        while start < stop:
            task, first = divmod(start, period)
            last = min(first + stop - start, period)
            yield Segment(task, start, self._task_ids(task)[first:last])
            start += last - first

    def label_map(self, task: int) -> IntArray | None:  # (classes,)
        """Return the target of each label in a task; None if labels are not permuted."""
        return self._permutation(task) if self.settings.stream == LABELS else None

    def pixel_map(self, task: int) -> IntArray | None:  # (pixels,)
        """Return, for each pixel of an input, the pixel of the image that it shows; None if pixels are not permuted."""
        return self._permutation(task) if self.settings.stream == PIXELS else None

    def targets(self, ids: IntArray, task: int) -> IntArray:
        """Return the targets of some samples in a task."""
        labels = self.labels[ids]
        found = self.label_map(task)
        return labels if found is None else found[labels]

    def _find_task_ids(self, task: int) -> IntArray:
        """Shuffle the data set, as often as the samples of a task need it."""
        rng = generator_of(self.seed, "batches", task)
        period, count = self.settings.period, len(self.labels)
        orders = [rng.permutation(count) for _ in range(-(-period // count))]
        return np.concatenate(orders)[:period].astype(np.int64)

    def _find_permutation(self, task: int) -> IntArray:
        if not self.settings.is_compounding:
            return self._drawn(task)
        first, found = (0, self._drawn(0)) if self._newest is None or self._newest[0] > task else self._newest
        for later in range(first + 1, task + 1):
            drawn = self._drawn(later)
            found = drawn[found] if self.settings.stream == LABELS else found[drawn]
        self._newest = (task, found)
        return found

    def _drawn(self, task: int) -> IntArray:
        size = self.num_classes if self.settings.stream == LABELS else self.num_pixels
        return generator_of(self.seed, "permutation", task).permutation(size).astype(np.int64)
