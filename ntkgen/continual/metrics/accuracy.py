"""The accuracy matrix R, and what follows from it.

R[i, j] is the accuracy on task j after training on task i; T is the number of tasks. Entries of tasks that were not
trained on yet (j > i) are kept. They are NaN if the task has no outputs yet, and the accuracy is therefore not defined.
All definitions count tasks from 1, and R is complete up to the last finished task.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class AccuracyMatrix:
    """The accuracy matrix of a run.

    Attributes:
        values: R, (finished tasks, tasks).
        chance: Accuracy on each task before any training, b, (tasks,); None if it was not measured.
        num_samples: Number of held-out samples n_j of each task, (tasks,); None for equally many.
    """

    values: FloatArray
    chance: FloatArray | None = None
    num_samples: IntArray | None = None

    @property
    def num_tasks(self) -> int:
        """Number of finished tasks, T."""
        return len(self.values)

    @property
    def average_accuracy(self) -> float:
        """Average accuracy after the last task, ACC = 1/T Σ_j R[T, j] (Lopez-Paz, Ranzato 2017, arXiv:1706.08840)."""
        return float(self.values[-1, : self.num_tasks].mean())

    @property
    def average_incremental_accuracy(self) -> float:
        """Mean over i of the average accuracy on the tasks up to i (Rebuffi et al. 2017, arXiv:1611.07725)."""
        return float(np.mean([self.values[i, : i + 1].mean() for i in range(self.num_tasks)]))

    @property
    def seen_accuracy(self) -> FloatArray:  # (finished tasks,)
        """Accuracy on all held-out samples of the tasks up to i, Σ_{j≤i} n_j R[i, j] / Σ_{j≤i} n_j, for each i."""
        weights = np.ones(self.values.shape[1]) if self.num_samples is None else self.num_samples
        return np.array([np.average(self.values[i, : i + 1], weights=weights[: i + 1]) for i in range(self.num_tasks)])

    @property
    def new_task_accuracy(self) -> FloatArray:  # (finished tasks,)
        """Accuracy on each task just after the training on it, R[i, i]."""
        return np.diag(self.values).copy()

    @property
    def backward_transfer(self) -> float | None:
        """BWT = 1/(T−1) Σ_{j<T} (R[T, j] − R[j, j]) (Lopez-Paz, Ranzato 2017); None for one task."""
        T = self.num_tasks
        return None if T < 2 else float(np.mean([self.values[-1, j] - self.values[j, j] for j in range(T - 1)]))

    @property
    def forward_transfer(self) -> float | None:
        """FWT = 1/(T−1) Σ_{j>1} (R[j−1, j] − b[j]) (Lopez-Paz, Ranzato 2017).

        None for one task, without b, or if accuracies on tasks before their training are not defined.
        """
        T = self.num_tasks
        if T < 2 or self.chance is None:
            return None
        transfer = float(np.mean([self.values[j - 1, j] - self.chance[j] for j in range(1, T)]))
        return None if np.isnan(transfer) else transfer

    @property
    def forgetting(self) -> float | None:
        """1/(T−1) Σ_{j<T} (max_{l<T} R[l, j] − R[T, j]) (Chaudhry et al. 2018, arXiv:1801.10112); None for one task."""
        T = self.num_tasks
        if T < 2:
            return None
        return float(np.mean([np.nanmax(self.values[:-1, j]) - self.values[-1, j] for j in range(T - 1)]))

    def to_json(self) -> dict[str, Any]:
        """Return the matrix and all metrics as plain values."""
        names = (
            "average_accuracy",
            "average_incremental_accuracy",
            "backward_transfer",
            "forward_transfer",
            "forgetting",
        )
        courses = {name: getattr(self, name).tolist() for name in ("seen_accuracy", "new_task_accuracy")}
        matrix = np.where(np.isnan(self.values), None, self.values).tolist()  # type: ignore[call-overload]
        return {"accuracy_matrix": matrix, **{name: getattr(self, name) for name in names}, **courses}


def accuracy_matrix(
    accuracy: FloatArray,  # (evaluations, tasks)
    trained_task: IntArray,  # (evaluations,)
    iteration: IntArray,  # (evaluations,)
    num_samples: IntArray,  # (tasks,)
    num_finished: int,
) -> AccuracyMatrix:
    """Take the last evaluation of each finished task, and the first of all if it was before any training."""
    last = [int(np.flatnonzero(trained_task == task)[-1]) for task in range(num_finished)]
    chance = accuracy[0] if len(iteration) and iteration[0] == 0 else None
    return AccuracyMatrix(np.asarray(accuracy[last], np.float64), chance, num_samples)
