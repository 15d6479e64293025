"""Several recorded runs as arrays with dimensions of seeds and widths, without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import xarray

from ntkgen.continual.configuration import RunSettings
from ntkgen.continual.joining import Key, joined
from ntkgen.continual.metrics.ranks import Tolerance
from ntkgen.continual.reader import SCORES, RunReader
from ntkgen.errors import StoreError
from ntkgen.files.folder import Folder


@dataclass(frozen=True, eq=False)
class RunCollection:
    """Recorded runs that differ in nothing but their seeds and widths.

    All data sets have the dimension ``seed`` and, if the runs have more than one width, the dimension ``width``. Runs
    that are not finished have NaN where they have recorded nothing yet.
    """

    folder: Folder
    runs: Mapping[Key, RunReader]

    @property
    def widths(self) -> list[int | None]:
        """The widths of the networks, in ascending order. None is the default width of the network."""
        return sorted({width for width, _ in self.runs}, key=lambda width: width or 0)

    @property
    def seeds(self) -> list[int]:
        """The seeds, in ascending order."""
        return sorted({seed for _, seed in self.runs})

    @property
    def settings(self) -> RunSettings:
        """The settings of the first run. The others have the same, except for seed and width."""
        return next(iter(self.runs.values())).settings

    @property
    def config(self) -> dict[str, Any]:
        """The common settings, and the lists of seeds and widths."""
        shared = {name: value for name, value in self.settings.to_json().items() if name not in {"seed", "width"}}
        return {"settings": shared, "seeds": self.seeds, "widths": self.widths}

    @property
    def num_tasks(self) -> int:
        """Number of tasks of the streams."""
        return next(iter(self.runs.values())).num_tasks

    @cached_property
    def complete(self) -> dict[Key, RunReader]:
        """The runs with the largest number of finished tasks. Their metrics can be compared.

        Raises:
            StoreError: If no run has a finished task.
        """
        finished = {key: run.num_finished for key, run in self.runs.items()}
        most = max(finished.values())
        if not most:
            raise StoreError(
                f"The runs at {self.folder} have no finished task: expected at least one, found none. Are they still "
                "at work? Wait, or run the same `ntkgen cl-run` again."
            )
        return {key: run for key, run in self.runs.items() if finished[key] == most}

    @cached_property
    def evaluations(self) -> xarray.Dataset:
        """Accuracy and loss of every task at every evaluation, and the class orders."""
        found = {}
        for key, run in self.runs.items():
            data = run.evaluations
            found[key] = data[[name for name in data.data_vars if "evaluation" in data[name].dims] + ["class_order"]]
        return joined(found, "evaluation", "trained_task")

    @property
    def accuracy(self) -> xarray.DataArray:
        """Accuracy on each task at every evaluation, over all outputs, ([width,] seed, evaluation, task)."""
        return self.evaluations["accuracy"]

    @cached_property
    def kernels(self) -> xarray.Dataset:
        """Kernels of the probe at every recorded time, ([width,] seed, time, row, col). Each seed has another probe."""
        return joined({key: run.kernels for key, run in self.runs.items()}, "time", "task")

    def kernel_metrics(
        self, dt: int | None = None, part: str = "train", rank_tolerance: Tolerance = None
    ) -> xarray.Dataset:
        """Measure every recorded kernel, as `RunReader.kernel_metrics` does."""
        found: dict[Key, xarray.Dataset] = {}
        for key, run in self.runs.items():
            found[key] = run.kernel_metrics(dt, part, rank_tolerance)
            dt = int(found[key].attrs["dt"])  # the same for all
        return joined(found, "time", "trained_task")

    def predicted_forgetting(self) -> xarray.Dataset:
        """Predict from the kernels how each task changes the outputs, as `RunReader.predicted_forgetting` does."""
        found = {key: run.predicted_forgetting() for key, run in self.runs.items()}
        return joined(found, "time", "trained_task")

    @property
    def plasticity(self) -> xarray.Dataset:
        """What the networks show at each boundary between tasks, as `RunReader.plasticity`, ([width,] seed, boundary).

        Raises:
            StoreError: If it was not measured for one of the runs.
        """
        return joined({key: run.plasticity for key, run in self.runs.items()})

    def metrics(self) -> xarray.Dataset:
        """Compute all metrics of the accuracy matrix, with the dimensions ``scores``, [``width``,] ``seed``.

        ``scores`` is ``class_incremental`` or ``task_incremental``. Runs with fewer finished tasks than others have
        NaN; see `complete`.

        Raises:
            StoreError: If no run has a finished task.
        """
        found = {key: _as_dataset(run.metrics()) for key, run in self.complete.items()}
        reindexed = joined(found).reindex(seed=self.seeds)
        return reindexed.reindex(width=self.widths) if len(self.widths) > 1 and "width" in reindexed.dims else reindexed


def _as_dataset(metrics: Mapping[str, Any]) -> xarray.Dataset:
    parts = []
    kinds = [kind for kind in SCORES if kind in metrics]
    for kind in kinds:
        found = metrics[kind]
        numbers = {name: value for name, value in found.items() if value is None or isinstance(value, int | float)}
        data: dict[str, Any] = {name: float("nan") if value is None else value for name, value in numbers.items()}
        data["accuracy_matrix"] = ("after_task", "task"), found["accuracy_matrix"]
        parts.append(xarray.Dataset(data))
    return xarray.concat(parts, xarray.DataArray(kinds, dims="scores", name="scores"), data_vars="all")
