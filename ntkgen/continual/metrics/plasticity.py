"""What activations and parameters say of the plasticity of a network, and its accuracy relative to a retrained one.

The accuracy on each class in the order in which the classes arrive is `confusion.class_accuracy`, because the targets
of a confusion matrix are in this order. Ranks of activations are in `ranks`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ntkgen.continual.metrics.spread import Spread
from ntkgen.errors import InputError, ShapeError

FloatArray = npt.NDArray[np.float64]

# A unit is dormant if it is active on a smaller part of samples and positions.
THRESHOLD = 0.01


def active_fraction(
    activations: npt.NDArray[Any],  # (samples, units, …), the further axes are positions
) -> FloatArray:  # (units,)
    """Compute the fraction of samples and positions at which each unit is not exactly zero.

    >>> active_fraction(np.array([[0.0, 1.0], [0.0, 0.0], [0.0, 3.0], [2.0, 4.0]])).tolist()
    [0.25, 0.75]
    """
    axes = (0, *range(2, activations.ndim))
    count = activations.size // activations.shape[1]
    return np.asarray(np.count_nonzero(activations, axis=axes) / count, np.float64)


def dormant_units(active: Sequence[FloatArray], threshold: float = THRESHOLD) -> float:
    """Compute the fraction of the units of all layers that are active on less than a threshold, Σ dormant / Σ units.

    Args:
        active: The `active_fraction` of the units of each layer.
        threshold: The threshold.

    References:
        Dohare et al. (2024), Nature 632, with the threshold 0.01. Sokar et al. (2023), arXiv:2302.12902, call a unit
        dormant by its mean activation relative to that of its layer, which is another measure.

    >>> dormant_units([np.array([0.0, 0.5]), np.array([0.005, 0.01])])
    0.5
    """
    return float(np.mean(np.concatenate(active) < threshold))


def weight_magnitude(parameters: Iterable[npt.NDArray[Any]]) -> float:
    """Compute the mean magnitude of all parameters, Σ |p| / #p, with biases and parameters of norms, without buffers.

    >>> weight_magnitude([np.array([[1.0, -3.0]]), np.array([2.0])])
    2.0
    """
    sums = [(float(np.abs(each, dtype=np.float64).sum()), each.size) for each in parameters]
    return sum(total for total, _ in sums) / sum(size for _, size in sums)


@dataclass(frozen=True, eq=False)
class RelativeAccuracy:
    """Accuracy minus that of networks that are retrained from scratch, paired by seed (Dohare et al. 2024, Nature 632).

    A seed draws the same classes, splits and order of classes for both, so their difference has less spread than each.

    Attributes:
        seeds: The seeds.
        differences: For each seed and each task, accuracy minus accuracy of the retrained network, (seeds, tasks); NaN
            where one of them is missing.
    """

    seeds: tuple[int, ...]
    differences: FloatArray

    @classmethod
    def of(cls, accuracy: Mapping[int, FloatArray], retrained: Mapping[int, FloatArray]) -> "RelativeAccuracy":
        """Pair the accuracies after each task by seed.

        Args:
            accuracy: For each seed the accuracy after each task, (tasks,).
            retrained: The same of networks that are retrained from scratch for each task. It may have further seeds.

        Raises:
            InputError: If a seed has no retrained network.
            ShapeError: If they have other numbers of tasks.
        """
        if missing := sorted(set(accuracy) - set(retrained)):
            raise InputError(
                f"The relative accuracy has no baseline: expected a retrained network of each seed {sorted(accuracy)}, "
                f"found none of seed {missing[0]}. Are its runs not finished yet? Run the method that resets the "
                "network at each task with the same seeds, or leave this seed out."
            )
        seeds = tuple(sorted(accuracy))
        shapes = {each[seed].shape for each in (accuracy, retrained) for seed in seeds}
        if len(shapes) > 1:
            raise ShapeError(
                "The relative accuracy compares other numbers of tasks: expected one accuracy per task of all runs, "
                f"found the shapes {sorted(shapes)}. Is a run not finished? Pass NaN for tasks that are missing."
            )
        return cls(seeds, np.array([accuracy[seed] - retrained[seed] for seed in seeds]))

    @cached_property
    def spreads(self) -> list[Spread | None]:  # of (tasks,)
        """Mean, standard deviation and interval of each task over the seeds; None for a task without any value."""
        return [Spread.of(column) for column in self.differences.T]

    @property
    def mean(self) -> FloatArray:  # (tasks,)
        """Mean difference over the seeds; NaN without values."""
        return np.array([np.nan if each is None else each.mean for each in self.spreads])

    @property
    def standard_error(self) -> FloatArray:  # (tasks,)
        """Standard error s / √n of the mean difference, with n − 1 in the variance; NaN for fewer than two seeds."""
        errors = [None if each is None else each.standard_error for each in self.spreads]
        return np.array([np.nan if error is None else error for error in errors])

    @property
    def interval(self) -> FloatArray:  # (tasks, 2)
        """Student's interval of 95 % of the mean difference; NaN for fewer than two seeds."""
        found = [None if each is None else each.interval for each in self.spreads]
        return np.array([(np.nan, np.nan) if each is None else each for each in found])
