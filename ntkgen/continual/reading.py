"""A run as arrays, without torch: `ntkgen.open_run`."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ntkgen.continual.configuration import RunSettings
from ntkgen.continual.metrics.accuracy import AccuracyMatrix, accuracy_matrix
from ntkgen.continual.metrics.confusion import class_accuracy
from ntkgen.continual.metrics.series import held_out_accuracy, kernel_metrics
from ntkgen.continual.metrics.worst_case import WorstCase, worst_case
from ntkgen.continual.record import read_config
from ntkgen.errors import InputError, StoreError, UnknownNameError
from ntkgen.files.folder import Folder
from ntkgen.files.place import folder_of

if TYPE_CHECKING:
    import os

    import xarray

PARTS = ("train", "validation", "all")


@dataclass(frozen=True, eq=False)
class RunReader:
    """A recorded run of one seed."""

    folder: Folder
    settings: RunSettings

    @cached_property
    def evaluations(self) -> "xarray.Dataset":
        """Accuracy and loss of every task at every evaluation, with class order, splits and probe."""
        import xarray

        found: xarray.Dataset = xarray.open_zarr(
            (self.folder / "run.zarr").zarr_store(read_only=True), consolidated=True
        )
        return found

    @cached_property
    def kernels(self) -> "xarray.Dataset":
        """Kernels of the probe at every recorded time."""
        import xarray

        found: xarray.Dataset = xarray.open_zarr(
            (self.folder / "kernels.zarr").zarr_store(read_only=True), consolidated=True
        )
        return found

    @property
    def num_tasks(self) -> int:
        """Number of tasks of the stream."""
        return int(self.evaluations.sizes["task"])

    @property
    def num_finished(self) -> int:
        """Number of tasks whose training has ended."""
        files = self.folder.sizes("models")
        return sum(f"models/task{task}.pt" in files for task in range(self.num_tasks))

    def matrix(self, measure: str = "accuracy") -> AccuracyMatrix:
        """Return the accuracy matrix; `measure` may also be ``task_accuracy``.

        Raises:
            StoreError: If no task is finished yet.
        """
        finished = self.num_finished
        if not finished:
            raise StoreError(
                f"The run at {self.folder} has no finished task: expected at least one, found none. Is it still at "
                "work? Wait, or run the same `ntkgen cl-run` again."
            )
        data = self.evaluations
        columns = [np.asarray(data[name].values) for name in (measure, "trained_task", "iteration")]
        return accuracy_matrix(columns[0], columns[1], columns[2], self.num_held_out, finished)

    @property
    def num_held_out(self) -> npt.NDArray[np.int64]:
        """Number of samples on which each task is evaluated, (tasks,)."""
        sizes = self.evaluations.sizes
        names = ((f"test_of_{task}", f"validation_of_{task}") for task in range(self.num_tasks))
        return np.array([sizes[test] if test in sizes else sizes.get(other, 1) for test, other in names], np.int64)

    def worst_case(self, measure: str = "accuracy") -> WorstCase:
        """Find the worst accuracies during training; `measure` may also be ``task_accuracy``."""
        data = self.evaluations
        return worst_case(np.asarray(data[measure].values), data.trained_task.values, self.num_finished)

    @property
    def confusion(self) -> npt.NDArray[np.int64] | None:
        """Confusion matrix at the end of each finished task, (ends, targets, targets); None if none was recorded."""
        data = self.evaluations
        recorded = "confusion" in data and data.sizes["task_end"] > 0
        return np.asarray(data.confusion.values, np.int64) if recorded else None

    def metrics(self) -> dict[str, Any]:
        """Compute all metrics of accuracy, class-incremental and task-incremental."""
        found: dict[str, Any] = {
            name: {**self.matrix(measure).to_json(), **self.worst_case(measure).to_json()}
            for name, measure in (("class_incremental", "accuracy"), ("task_incremental", "task_accuracy"))
        }
        if (confusion := self.confusion) is not None:
            found["confusion"] = confusion[-1].tolist()
            found["class_accuracy"] = [
                None if np.isnan(each) else float(each) for each in class_accuracy(confusion[-1])
            ]
        return found

    def kernels_of(self, part: str) -> "xarray.Dataset":
        """Select the kernels of one part of the probe: ``train``, ``validation`` or ``all``.

        Raises:
            UnknownNameError: If there is no part of that name.
            InputError: If the probe has no samples of that part.
        """
        if part not in PARTS:
            raise UnknownNameError("part of the probe", part, PARTS)
        if part == "all":
            return self.kernels
        chosen = self._is_validation if part == "validation" else ~self._is_validation
        if not chosen.any():
            raise InputError(
                f"The probe of the run at {self.folder} has no {part} samples: expected some, found none. Was it begun "
                "without `probe_parts` both? Choose the part train."
            )
        rows = np.flatnonzero(chosen[self.kernels.row_sample.values])
        return self.kernels.isel(row=rows, col=rows)

    def kernel_metrics(
        self, dt: int | None = None, part: str = "train", rank_tolerance: float | None = None
    ) -> "xarray.Dataset":
        """Measure every recorded kernel of one part; see `ntkgen.continual.metrics.series.kernel_metrics`.

        If the probe has validation samples, ``held_out_accuracy`` is the accuracy on them of kernel regression on the
        training samples of the tasks so far.
        """
        found = kernel_metrics(self.kernels_of(part), dt, rank_tolerance)
        if self._is_validation.any():
            found["held_out_accuracy"] = ("time", held_out_accuracy(self.kernels, self._is_validation))
        return found

    @property
    def _is_validation(self) -> npt.NDArray[np.bool_]:  # (probe samples,)
        data = self.evaluations
        if "probe_is_validation" not in data:
            return np.zeros(data.sizes["probe"], np.bool_)
        return np.asarray(data.probe_is_validation.values, np.bool_)


def open_run(place: "str | os.PathLike[str] | Folder") -> RunReader:
    """Open the folder of one seed of a run.

    Raises:
        StoreError: If there is no run.
    """
    folder = folder_of(place)
    config = read_config(folder)
    if config is None:
        raise StoreError(
            f"There is no run at {folder}: expected a folder with config.json, as RUN/seed0, found none. Is it the "
            "folder of several seeds? Name one of them."
        )
    return RunReader(folder, RunSettings.from_json(config["settings"]))
