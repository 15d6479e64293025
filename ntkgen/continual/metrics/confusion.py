"""Confusion matrices: how many samples of each class are taken for each class.

C[a, b] is the number of samples of target a whose predicted target is b, among the held-out samples of the tasks so
far. A target is the position of a class in the class order.
"""

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def count_confusions(targets: IntArray, predictions: IntArray, num_targets: int) -> IntArray:  # (targets, targets)
    """Count the samples of each pair of target and predicted target.

    >>> count_confusions(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    pairs = np.bincount(targets * num_targets + predictions, minlength=num_targets**2)
    return pairs.reshape(num_targets, num_targets).astype(np.int64)


def class_accuracy(confusion: IntArray) -> FloatArray:  # (targets,)
    """Accuracy on each class, C[a, a] / Σ_b C[a, b]; NaN for a class without samples.

    >>> class_accuracy(np.array([[3, 1, 0], [0, 0, 2], [0, 0, 0]])).tolist()
    [0.75, 0.0, nan]
    """
    counts = confusion.sum(1)
    return np.where(counts, np.diag(confusion) / np.maximum(counts, 1), np.nan)


def total_accuracy(confusion: IntArray) -> float:
    """Accuracy on all samples, tr C / Σ C.

    >>> total_accuracy(np.array([[3, 1], [2, 2]]))
    0.625
    """
    return float(np.trace(confusion) / confusion.sum())
