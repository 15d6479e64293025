"""The worst accuracies during training, from all evaluations and not only those at the ends of tasks.

A(j, n) is the accuracy on task j after n iterations, and e_j is the iteration at which the training on task j ends.
Tasks are counted from 1 here.

References:
    De Lange, van de Ven, Tuytelaars (2023), arXiv:2205.13452, section 3. The authors evaluate after each iteration.
    Between two evaluations that are further apart the accuracy may be lower than what is found here.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class WorstCase:
    """The worst accuracies at the end of each finished task k, (finished tasks,) each.

    Attributes:
        minimum: min-ACC_k = 1/(k−1) Σ_{i<k} min_n A(i, n) over e_i < n ≤ e_k; NaN for k = 1.
        worst_case: WC-ACC_k = 1/k A(k, e_k) + (1 − 1/k) min-ACC_k. For k = 1 it is A(1, e_1).
        evaluations: Number of evaluations while task k was trained.
    """

    minimum: FloatArray
    worst_case: FloatArray
    evaluations: IntArray

    def to_json(self) -> dict[str, Any]:
        """Return the values at the end of the last finished task, and the courses over the tasks."""
        return {
            "minimum_accuracy": None if len(self.minimum) < 2 else float(self.minimum[-1]),
            "worst_case_accuracy": float(self.worst_case[-1]),
            "minimum_accuracy_after_task": [None if np.isnan(value) else float(value) for value in self.minimum],
            "worst_case_accuracy_after_task": self.worst_case.tolist(),
            "evaluations_of_task": self.evaluations.tolist(),
        }


def worst_case(
    accuracy: FloatArray,  # (evaluations, tasks)
    trained_task: IntArray,  # (evaluations,)
    num_finished: int,
) -> WorstCase:
    """Find the worst accuracies at the end of each finished task.

    Args:
        accuracy: Accuracy on each task at each evaluation, in the order of time.
        trained_task: Task in training at each evaluation. The end of a task belongs to this task.
        num_finished: Number of tasks whose training has ended.
    """
    last = np.array([np.flatnonzero(trained_task == task)[-1] for task in range(num_finished)])
    minimum, worst = np.full(num_finished, np.nan), np.empty(num_finished)
    for current, end in enumerate(last):
        lowest = [accuracy[last[old] + 1 : end + 1, old].min() for old in range(current)]
        minimum[current] = np.mean(lowest) if lowest else np.nan
        share = 1 / (current + 1)
        worst[current] = share * accuracy[end, current] + ((1 - share) * minimum[current] if lowest else 0)
    counts = [int((trained_task == task).sum()) for task in range(num_finished)]
    return WorstCase(minimum, worst, np.array(counts, np.int64))
