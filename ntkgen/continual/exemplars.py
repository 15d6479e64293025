"""Exemplars: a bounded number of samples of every class seen so far, chosen at random or by herding."""

import numpy as np
import numpy.typing as npt

from ntkgen.continual.streams.tasks import IntArray
from ntkgen.errors import InputError, UnknownNameError

FloatArray = npt.NDArray[np.float64]
SELECTIONS = ("herding", "random")


def herd(
    features: FloatArray,  # (samples, features), of norm 1
    count: int,
) -> IntArray:  # (count,)
    """Choose samples one by one, so that the mean of those chosen stays as close to the class mean as possible.

    The k-th choice minimises ‖μ − (φ(x) + Σ_{j<k} φ(x_j)) / k‖ over the samples that are left.

    References:
        Rebuffi, Kolesnikov, Sperl, Lampert (2017), arXiv:1611.07725, algorithm 4; Welling (2009).
    """
    mean, total = features.mean(0), np.zeros(features.shape[1])
    left, chosen = np.ones(len(features), bool), []
    for number in range(1, min(count, len(features)) + 1):
        distances = np.linalg.norm(mean - (total + features) / number, axis=1)
        distances[~left] = np.inf
        best = int(distances.argmin())
        chosen.append(best)
        left[best] = False
        total = total + features[best]
    return np.array(chosen, np.int64)


def choose(
    selection: str, ids: IntArray, features: FloatArray, count: int, rng: np.random.Generator
) -> IntArray:  # (count,)
    """Choose exemplars of one class, in the order of their importance.

    Raises:
        UnknownNameError: If there is no selection of that name.
    """
    if selection not in SELECTIONS:
        raise UnknownNameError("selection of exemplars", selection, SELECTIONS)
    order = herd(features, count) if selection == "herding" else rng.permutation(len(ids))[:count]
    return ids[order]


def quota(budget: int, num_classes: int, rounding: str = "down") -> int:
    """Divide a budget among classes, and round ``down`` or ``up``.

    Raises:
        InputError: If not every class gets one.
    """
    if budget < num_classes:
        raise InputError(
            f"A budget of {budget} exemplars is too small for {num_classes} classes: expected at least one for each. "
            "Is it the number per class? Raise `buffer`."
        )
    return -(-budget // num_classes) if rounding == "up" else budget // num_classes
