"""Curves over tasks: one number per task from those of its epochs, and mean and standard error over seeds."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ntkgen.continual.metrics.plasticity import RelativeAccuracy
from ntkgen.continual.metrics.spread import Spread

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Curve:
    """A quantity over the number of classes.

    Attributes:
        classes: Number of classes at each point, (points,).
        mean: Mean over the seeds, (points,); NaN without values.
        standard_error: Standard error s / √n of the mean, with n − 1 in the variance, (points,); NaN for fewer than two
            seeds.
        num_seeds: Number of seeds.
    """

    classes: IntArray
    mean: FloatArray
    standard_error: FloatArray
    num_seeds: int

    @classmethod
    def of(cls, classes: IntArray, values: Mapping[int, FloatArray]) -> "Curve":
        """Average over seeds. A seed with fewer points has finished fewer tasks.

        Args:
            classes: Number of classes at each point.
            values: The values of each seed.

        >>> curve = Curve.of(np.array([5, 10]), {0: np.array([1.0, 4.0]), 1: np.array([3.0])})
        >>> curve.mean.tolist(), curve.standard_error.tolist()
        ([2.0, 4.0], [1.0, nan])
        """
        spreads = [Spread.of(column) for column in np.array(list(padded(values).values())).T]
        means = [np.nan if each is None else each.mean for each in spreads]
        errors = [None if each is None else each.standard_error for each in spreads]
        shown = np.array([np.nan if error is None else error for error in errors])
        return cls(classes[: len(means)], np.array(means), shown, len(values))

    @classmethod
    def relative(
        cls, classes: IntArray, values: Mapping[int, FloatArray], baseline: Mapping[int, FloatArray]
    ) -> "Curve":
        """Average the differences from a baseline of the same seeds; see `RelativeAccuracy`.

        Raises:
            InputError: If a seed has no baseline.
        """
        length = max(len(each) for each in values.values())
        baseline = {seed: row[:length] for seed, row in baseline.items()}
        found = RelativeAccuracy.of(padded(values, length), padded(baseline, length))
        return cls(classes[:length], found.mean, found.standard_error, len(values))


def padded(values: Mapping[int, FloatArray], length: int = 0) -> dict[int, FloatArray]:
    """Add NaN for tasks that are not finished, up to the length of the longest array or to a larger length."""
    length = max([length, *(len(each) for each in values.values())])
    return {seed: np.concatenate([each, np.full(length - len(each), np.nan)]) for seed, each in sorted(values.items())}


def of_selected_epochs(
    values: FloatArray,  # (epochs of all tasks,)
    epochs: int,
    validation: FloatArray | None = None,  # (epochs of all tasks,)
) -> FloatArray:  # (tasks,)
    """Take one value of each task: that of the first epoch with the largest validation accuracy, or of the last epoch.

    >>> of_selected_epochs(np.array([1.0, 2.0, 3.0, 4.0]), 2, np.array([0.5, 0.4, 0.1, 0.1])).tolist()
    [1.0, 3.0]
    >>> of_selected_epochs(np.array([1.0, 2.0, 3.0, 4.0]), 2).tolist()
    [2.0, 4.0]
    """
    tasks = len(values) // epochs
    rows = values[: tasks * epochs].reshape(tasks, epochs)
    if validation is None:
        return np.asarray(rows[:, -1])
    chosen = validation[: tasks * epochs].reshape(tasks, epochs).argmax(1)
    return np.asarray(rows[np.arange(tasks), chosen])
