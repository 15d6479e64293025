"""One recorded run as arrays, without torch."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray

from ntkgen.continual.configuration import RunSettings
from ntkgen.continual.epochs import Epochs
from ntkgen.continual.metrics.accuracy import AccuracyMatrix, accuracy_matrix
from ntkgen.continual.metrics.confusion import class_accuracy
from ntkgen.continual.metrics.forgetting import BINARY, predicted_forgetting
from ntkgen.continual.metrics.ranks import Tolerance
from ntkgen.continual.metrics.series import (
    boundary_metrics,
    held_out_accuracy,
    kernel_metrics,
    loss_weighted_metrics,
)
from ntkgen.continual.metrics.worst_case import worst_case
from ntkgen.continual.record import LOG, read_config
from ntkgen.continual.series import ROOT, read_arrays
from ntkgen.continual.streams.views import VIEWS
from ntkgen.errors import InputError, StoreError, UnknownNameError
from ntkgen.files.folder import Folder

# The two kinds of scores, over all outputs and over the outputs of the task, with their measures in evaluations.
SCORES = {"class_incremental": "accuracy", "task_incremental": "task_accuracy"}
# What is known of each evaluation.
MOMENT = ("iteration", "trained_task", "epoch")
PARTS = ("train", "validation", "all")
# Methods whose loss is a binary cross-entropy per output.
BINARY_METHODS = ("lwf-mc", "icarl")
# The group with the plasticity of a run, and its attribute that says how it was measured.
PLASTICITY, MEASURED = "plasticity.zarr", "ntkgen_plasticity"


@dataclass(frozen=True, eq=False)
class RunReader:
    """A recorded run of one seed."""

    folder: Folder
    settings: RunSettings

    @cached_property
    def config(self) -> dict[str, Any]:
        """Settings, fingerprint of the data, and versions, as stored."""
        found = read_config(self.folder)
        assert found is not None
        return found

    @cached_property
    def evaluations(self) -> xarray.Dataset:
        """Accuracy and loss of every task at every evaluation, with class order, splits and probe."""
        found = read_arrays(self.folder / "run.zarr")
        return found.set_coords([name for name in MOMENT if name in found])

    @property
    def accuracy(self) -> xarray.DataArray:
        """Accuracy on each task at every evaluation, over all outputs, (evaluation, task)."""
        return self.evaluations["accuracy"]

    @cached_property
    def kernels(self) -> xarray.Dataset:
        """Kernels of the probe at every recorded time."""
        found = read_arrays(self.folder / "kernels.zarr")
        return found.assign({name: values.chunk({"time": 1}) for name, values in found.data_vars.items()})

    @property
    def num_tasks(self) -> int:
        """Number of tasks of the stream."""
        return int(self.evaluations.sizes["task"])

    @property
    def num_finished(self) -> int:
        """Number of tasks whose training has ended."""
        run = self.evaluations.attrs.get("ntkgen_run", {})
        if "finished_tasks" in run:  # an imported run, which has no parameters
            return int(run["finished_tasks"])
        files = self.folder.sizes("models")
        return sum(f"models/task{task}.pt" in files for task in range(self.num_tasks))

    @cached_property
    def epochs(self) -> Epochs:
        """What is logged of each epoch. Imported runs, and those of earlier versions, have none."""
        return Epochs.of((self.folder.read(LOG) or b"").decode().splitlines())

    def has(self, measure: str) -> bool:
        """Whether a measure of the evaluations has any values. Imported runs lack some."""
        return bool(np.isfinite(self.evaluations[measure].values).any())

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

    @property
    def evaluated_on(self) -> str:
        """The samples on which the tasks are evaluated, in words."""
        return self.settings.evaluated_on(has_test_split="test_of_0" in self.evaluations.sizes)

    @property
    def confusion(self) -> npt.NDArray[np.int64] | None:
        """Confusion matrix at the end of each finished task, (ends, targets, targets); None if none was recorded."""
        data = self.evaluations
        recorded = "confusion" in data and data.sizes["task_end"] > 0
        return np.asarray(data.confusion.values, np.int64) if recorded else None

    def metrics(self) -> dict[str, Any]:
        """Compute all metrics of accuracy, class-incremental and, where it was recorded, task-incremental."""
        data, found = self.evaluations, dict[str, Any]()
        for name, measure in SCORES.items():
            if self.has(measure):
                worst = worst_case(data[measure].values, data.trained_task.values, self.num_finished)
                found[name] = {**self.matrix(measure).to_json(), **worst.to_json()}
        if (confusion := self.confusion) is not None:
            found["confusion"] = confusion[-1].tolist()
            found["class_accuracy"] = [
                None if np.isnan(each) else float(each) for each in class_accuracy(confusion[-1])
            ]
        return found

    def kernels_of(self, part: str) -> xarray.Dataset:
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
                "without `ntkgen cl-run --probe-parts both`? Choose the part train."
            )
        rows = np.flatnonzero(chosen[self.kernels.row_sample.values])
        return self.kernels.isel(row=rows, col=rows, sample=np.flatnonzero(chosen), missing_dims="ignore")

    def kernel_metrics(
        self, dt: int | None = None, part: str = "train", rank_tolerance: Tolerance = None
    ) -> xarray.Dataset:
        """Measure every recorded kernel of one part; see `ntkgen.continual.metrics.series.kernel_metrics`.

        If the probe has validation samples, ``held_out_accuracy`` is the accuracy on them of kernel regression on the
        training samples of the tasks so far.
        """
        found = kernel_metrics(self.kernels_of(part), dt, rank_tolerance)
        if self.has_validation_probe:
            found["held_out_accuracy"] = ("time", held_out_accuracy(self.kernels, self._is_validation))
        return found

    def predicted_forgetting(self) -> xarray.Dataset:
        """Predict from the kernels how each task changes the outputs on the probe samples of all tasks.

        See `ntkgen.continual.metrics.forgetting.predicted_forgetting`. The probe samples are training samples.
        """
        loss = BINARY if self.settings.method in BINARY_METHODS else self.settings.loss
        return predicted_forgetting(self.kernels_of("train"), loss)

    def loss_weighted_metrics(self, rank_tolerance: Tolerance = None) -> xarray.Dataset:
        """Measure the loss-weighted kernel of the training samples of the probe at every recorded time.

        It is weighted over the outputs that the loss uses, so with a masked head over those of the classes so far. See
        `ntkgen.continual.metrics.series.loss_weighted_metrics`.
        """
        kernels = self.kernels_of("train")
        return loss_weighted_metrics(kernels, self._num_used(kernels.task.values), rank_tolerance)

    @property
    def plasticity(self) -> xarray.Dataset:
        """What the network shows at each boundary between tasks, as `ntkgen cl-analyze --units` has measured it.

        The dimension ``boundary`` is the number of finished tasks. See `ntkgen.continual.plasticity.Plasticity`.

        Raises:
            StoreError: If it was not measured.
        """
        if not self.has_plasticity:
            raise StoreError(
                f"The plasticity of the run at {self.folder} is not measured: expected {PLASTICITY}, found none. It is "
                "measured after the run, from stored parameters. Run `ntkgen cl-analyze --units` with this run."
            )
        found = read_arrays(self.folder / PLASTICITY)
        return found.set_coords([name for name in ("num_classes", "class_label") if name in found])

    @property
    def has_plasticity(self) -> bool:
        """Whether the plasticity was measured."""
        return self.folder.has(f"{PLASTICITY}/{ROOT}")

    def boundary_kernels(self, view: str) -> xarray.Dataset:
        """Kernels of a view at each boundary, as `ntkgen cl-analyze --boundary-kernels` has computed them.

        They are as `kernels`, and the rows of each time are other samples: their coordinates, such as ``row_label``,
        have the dimensions (time, row). Rows without a sample are NaN, with the sample id −1.

        Args:
            view: ``next_task`` or ``previous_tasks``.

        Raises:
            UnknownNameError: If there is no such view.
            StoreError: If they were not computed.
        """
        if not self.has_boundary_kernels(view):
            raise StoreError(
                f"The run at {self.folder} has no kernels of the {view.replace('_', ' ')}: expected "
                f"{kernels_of_view(view)}, found none. They are computed after the run, from stored parameters. Run "
                "`ntkgen cl-analyze --boundary-kernels` with this run."
            )
        found = read_arrays(self.folder / kernels_of_view(view)).set_coords("boundary")
        return found.assign({name: values.chunk({"time": 1}) for name, values in found.data_vars.items()})

    def has_boundary_kernels(self, view: str) -> bool:
        """Whether the kernels of a view were computed.

        Raises:
            UnknownNameError: If there is no such view.
        """
        if view not in VIEWS:
            raise UnknownNameError("view", view, VIEWS)
        return self.folder.has(f"{kernels_of_view(view)}/{ROOT}")

    def boundary_kernel_metrics(
        self, view: str, rank_tolerance: Tolerance = None, *, weighted: bool = False
    ) -> xarray.Dataset:
        """Measure the kernels of a view; see `ntkgen.continual.metrics.series.boundary_metrics`.

        Args:
            view: ``next_task`` or ``previous_tasks``.
            rank_tolerance: Tolerance of the numerical rank, or several.
            weighted: Whether to measure the spectrum of the loss-weighted kernel instead.
        """
        kernels = self.boundary_kernels(view)
        tasks = kernels.boundary.values - (view != VIEWS[0])
        return boundary_metrics(kernels, rank_tolerance, self._num_used(tasks) if weighted else None)

    @property
    def boundary_iterations(self) -> npt.NDArray[np.int64]:
        """Number of iterations at the beginning and at the end of each finished task, (boundaries,)."""
        data = self.evaluations
        trained, iterations = data.trained_task.values, data.iteration.values
        ends = [int(iterations[trained == task].max()) for task in range(self.num_finished)]
        return np.array([0, *ends], np.int64)

    def _num_used(self, tasks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Count the outputs that the loss of each of some tasks is over."""
        if self.settings.head == "fixed":
            return np.full(len(tasks), self.evaluations.sizes["target"])
        return self.num_seen_classes[tasks]

    @property
    def has_validation_probe(self) -> bool:
        """Whether the probe has validation samples."""
        return bool(self._is_validation.any())

    @property
    def num_seen_classes(self) -> npt.NDArray[np.int64]:
        """Number of classes of each task and all tasks before it, (tasks,)."""
        data = self.evaluations
        if "num_seen" in data:
            return np.asarray(data.num_seen.values, np.int64)
        return np.cumsum(self.settings.stream_settings.split.sizes(data.sizes["target"]))[: self.num_tasks]

    @property
    def _is_validation(self) -> npt.NDArray[np.bool_]:  # (probe samples,)
        data = self.evaluations
        if "probe_is_validation" not in data:
            return np.zeros(data.sizes["probe"], np.bool_)
        return np.asarray(data.probe_is_validation.values, np.bool_)


def kernels_of_view(view: str) -> str:
    """Name the group with the kernels of a view at each boundary.

    >>> kernels_of_view("next_task")
    'next_task_kernels.zarr'
    """
    return f"{view}_kernels.zarr"
