"""Scores of a stream of tasks: averages, Lipschitz number, forgetting and change of plasticity, from NumPy arrays.

They are the scores of the predecessor's report on UPGD with adaptive noise, without its mistakes: its first bin was a
single sample, which made the forgetting minus the final accuracy.
"""

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
# Number of tasks at the end over which the late accuracy is averaged.
LATE_TASKS = 20


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of runs, each an array of one number per run.

    Attributes:
        average_accuracy: Mean accuracy over the tasks.
        late_accuracy: Mean accuracy over the last `LATE_TASKS` tasks.
        average_plasticity: Mean plasticity over the tasks.
        lipschitz: The largest change of the loss between two tasks in a row, max |L_{k+1} − L_k|, in nat.
        forgetting: Accuracy in the first task minus accuracy in the last task.
        largest_drop: The largest fall of the accuracy between two tasks in a row, max (a_k − a_{k+1}).
        plasticity_change: Plasticity in the first task minus plasticity in the last task.
    """

    average_accuracy: FloatArray
    late_accuracy: FloatArray
    average_plasticity: FloatArray
    lipschitz: FloatArray
    forgetting: FloatArray
    largest_drop: FloatArray
    plasticity_change: FloatArray


SCORES = tuple(field.name for field in fields(Scores))


def scores(losses: FloatArray, accuracies: FloatArray, plasticity: FloatArray) -> Scores:  # each (tasks, runs)
    """Compute the scores of runs. Those of two tasks in a row are NaN if there is one task only.

    >>> accuracies = np.array([[0.2], [0.6], [0.5]])
    >>> found = scores(np.array([[2.0], [1.0], [1.5]]), accuracies, np.array([[0.5], [0.4], [0.4]]))
    >>> [round(float(getattr(found, name)[0]), 3) for name in SCORES]
    [0.433, 0.433, 0.433, 1.0, -0.3, 0.1, 0.1]
    """
    undefined = np.full(losses.shape[1:], np.nan)
    has_pairs = len(losses) > 1
    with np.errstate(invalid="ignore"):  # infinity minus infinity is NaN
        changes = np.abs(np.diff(losses, axis=0))
    return Scores(
        accuracies.mean(0),
        accuracies[-LATE_TASKS:].mean(0),
        plasticity.mean(0),
        changes.max(0) if has_pairs else undefined,
        accuracies[0] - accuracies[-1] if has_pairs else undefined,
        -np.diff(accuracies, axis=0).min(0) if has_pairs else undefined,
        plasticity[0] - plasticity[-1] if has_pairs else undefined,
    )
