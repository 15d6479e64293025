"""When a run evaluates and computes kernels: iterations, epochs and ends of tasks, and densely after a switch."""

import math
import re
from dataclasses import dataclass

from ntkgen.errors import InputError


@dataclass(frozen=True)
class Moment:
    """A point of training, after ``step`` iterations of a task.

    Attributes:
        task: Number of the task.
        step: Iterations of this task that are done; 0 just after the switch.
        steps_per_epoch: Iterations of an epoch of this task.
        num_steps: Iterations of this task in all.
    """

    task: int
    step: int
    steps_per_epoch: int
    num_steps: int

    @property
    def ends_epoch(self) -> bool:
        """Whether an epoch has just ended."""
        return self.step > 0 and self.step % self.steps_per_epoch == 0

    @property
    def ends_task(self) -> bool:
        """Whether the task has just ended."""
        return self.step == self.num_steps


@dataclass(frozen=True)
class Schedule:
    """A set of moments: every few iterations, every few epochs, at the end of each task, and after each switch.

    Attributes:
        iterations: Number of iterations between two moments, counted from the switch; None for none.
        epochs: Number of epochs between two moments; None for none.
        dense: Last iteration of the moments 0, 1, 2, 4, 8, … after each switch; None for none.
    """

    iterations: int | None = None
    epochs: int | None = None
    dense: int | None = None

    @classmethod
    def parse(cls, text: str, dense: int | None = None) -> "Schedule":
        """Read ``10it``, ``1ep``, ``task`` or ``never``.

        Raises:
            InputError: If it is none of these.

        >>> Schedule.parse("10it"), Schedule.parse("task").contains(Moment(0, 6, 3, 6))
        (Schedule(iterations=10, epochs=None, dense=None), True)
        """
        found = re.fullmatch(r"([1-9]\d*)(it|ep)|task", text)
        if found is None:
            raise InputError(
                f"{text!r} is no schedule: expected for example 10it (every 10 iterations), 1ep (every epoch) or task "
                "(the end of each task). A schedule that never looks records nothing."
            )
        count, unit = (int(found[1]), found[2]) if found[1] else (None, "task")
        return cls(count if unit == "it" else None, count if unit == "ep" else None, dense)

    def __str__(self) -> str:
        """Write as `parse` reads."""
        return f"{self.iterations}it" if self.iterations else f"{self.epochs}ep" if self.epochs else "task"

    def contains(self, moment: Moment) -> bool:
        """Say whether a moment belongs to the schedule. The end of a task always does."""
        if moment.ends_task:
            return True
        step = moment.step
        return bool(
            (self.iterations and step % self.iterations == 0)
            or (self.epochs and moment.ends_epoch and step // moment.steps_per_epoch % self.epochs == 0)
            or (self.dense is not None and _is_power_of_two_or_zero(step) and step <= self.dense)
        )

    def count(self, steps_per_epoch: int, num_epochs: int, *, is_first: bool = True) -> int:
        """Count the moments of one task. The moment before training belongs to the first task alone.

        >>> Schedule(epochs=1, dense=4).count(steps_per_epoch=10, num_epochs=3)
        7
        """
        num_steps = steps_per_epoch * num_epochs
        moments = (Moment(0, step, steps_per_epoch, num_steps) for step in range(not is_first, num_steps + 1))
        return sum(self.contains(moment) for moment in moments)


def _is_power_of_two_or_zero(step: int) -> bool:
    return step == 0 or math.log2(step).is_integer()
