"""A stream: its tasks, and which samples each of them trains on, validates on and is tested on."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Task:
    """One task of a stream. It holds positions in the data set, never images.

    Attributes:
        number: Position in the stream, from 0.
        classes: Labels of the data set that are its own, in the order of the stream.
        train: Positions of the training samples in the split ``train`` of the data set. In a cumulative stream they are
            those of all classes so far.
        validation: Positions of the validation samples in the same split.
        test: Positions of the test samples in the split ``test``; empty if the data set has none.
    """

    number: int
    classes: tuple[int, ...]
    train: IntArray
    validation: IntArray
    test: IntArray


@dataclass(frozen=True, eq=False)
class Stream:
    """The ordered tasks of a run.

    The target of a class is its position in ``order``: the first task has the targets 0, 1, ….

    Attributes:
        tasks: The tasks.
        order: Labels of the data set in the order in which they first occur.
        blend_steps: Number of iterations after each switch over which samples of the last task fade out; 0 for an
            abrupt switch.
    """

    tasks: tuple[Task, ...]
    order: tuple[int, ...]
    blend_steps: int = 0

    def __len__(self) -> int:
        """Count the tasks."""
        return len(self.tasks)

    @property
    def num_targets(self) -> int:
        """Number of classes in all tasks."""
        return len(self.order)

    @cached_property
    def _targets(self) -> IntArray:
        targets = np.full(max(self.order) + 1, -1, dtype=np.int64)
        targets[list(self.order)] = np.arange(len(self.order))
        return targets

    def targets(self, labels: IntArray) -> IntArray:
        """Map labels of the data set to targets."""
        return self._targets[labels]

    def task_targets(self, task: int) -> tuple[int, ...]:
        """List the targets of a task."""
        return tuple(self.targets(np.asarray(self.tasks[task].classes)).tolist())

    def num_seen(self, task: int) -> int:
        """Count the targets of a task and all tasks before it."""
        return 1 + max(max(self.task_targets(earlier)) for earlier in range(task + 1))

    def old_fraction(self, step: int) -> float:
        """Fraction of a batch that still comes from the task before, ``step`` iterations after a switch.

        It falls linearly from almost 1 to 0 over ``blend_steps`` iterations.

        >>> stream = Stream((), (0,), blend_steps=4)
        >>> [stream.old_fraction(step) for step in range(6)]
        [0.8, 0.6, 0.4, 0.2, 0.0, 0.0]
        """
        return max(0.0, round(1 - (step + 1) / (self.blend_steps + 1), 12)) if self.blend_steps else 0.0

    def describe(self) -> list[dict[str, Any]]:
        """List what each task consists of, as plain values."""
        return [
            {
                "task": task.number,
                "classes": list(task.classes),
                "train": len(task.train),
                "validation": len(task.validation),
                "test": len(task.test),
            }
            for task in self.tasks
        ]
