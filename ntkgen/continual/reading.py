"""Recorded runs as arrays, without torch: `ntkgen.open_run`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xarray

from ntkgen.continual.configuration import RunSettings
from ntkgen.continual.epochs import Epochs
from ntkgen.continual.joining import Key, joined
from ntkgen.continual.metrics.accuracy import AccuracyMatrix, accuracy_matrix
from ntkgen.continual.metrics.confusion import class_accuracy
from ntkgen.continual.metrics.forgetting import BINARY, predicted_forgetting
from ntkgen.continual.metrics.series import held_out_accuracy, kernel_metrics
from ntkgen.continual.metrics.worst_case import worst_case
from ntkgen.continual.record import CONFIG, LOG, read_config
from ntkgen.errors import FingerprintError, InputError, StoreError, UnknownNameError
from ntkgen.files.folder import Folder
from ntkgen.files.place import folder_of

if TYPE_CHECKING:
    import os

# The two kinds of scores, over all outputs and over the outputs of the task, with their measures in evaluations.
SCORES = {"class_incremental": "accuracy", "task_incremental": "task_accuracy"}
# What is known of each evaluation.
MOMENT = ("iteration", "trained_task", "epoch")
# The folder of a run in that of several.
_MEMBER = re.compile(r"((?:width\d+/)?seed\d+)/config\.json")
PARTS = ("train", "validation", "all")
# Methods whose loss is a binary cross-entropy per output.
BINARY_METHODS = ("lwf-mc", "icarl")


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
        self, dt: int | None = None, part: str = "train", rank_tolerance: float | None = None
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
        self, dt: int | None = None, part: str = "train", rank_tolerance: float | None = None
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


def open_run(place: "str | os.PathLike[str] | Folder") -> RunReader | RunCollection:
    """Open the folder of one seed of a run, or the folder of several seeds and widths.

    Raises:
        FingerprintError: If the runs in the folder differ in more than their seeds and widths.
        StoreError: If there is no run.
    """
    folder = folder_of(place)
    return _opened(folder) or open_collection(folder)


def is_run(place: "str | os.PathLike[str] | Folder") -> bool:
    """Say whether there is a run, or a folder of runs; a kernel store is none."""
    folder = folder_of(place)
    if folder.has("zarr.json"):
        return False
    return folder.has(CONFIG) or bool(run_names(folder))


def run_names(folder: Folder) -> list[str]:
    """List the folders of the runs in a folder of several seeds and widths, such as ``width8/seed0``."""
    return [found[1] for key in folder.sizes() if (found := _MEMBER.fullmatch(key))]


def open_seed(place: "str | os.PathLike[str] | Folder") -> RunReader:
    """Open the folder of one seed of a run.

    Raises:
        StoreError: If there is no run, or it is the folder of several.
    """
    folder = folder_of(place)
    run = _opened(folder)
    if run is None:
        raise StoreError(
            f"There is no run at {folder}: expected a folder with config.json, as RUN/seed0, found none. Is it the "
            "folder of several seeds? Name one of them."
        )
    return run


def open_collection(place: "str | os.PathLike[str] | Folder") -> RunCollection:
    """Open the runs of several seeds and widths. The folder of one seed is a collection of one run.

    Raises:
        FingerprintError: If the runs differ in more than their seeds and widths.
        StoreError: If there is no run.
    """
    folder = folder_of(place)
    alone = _opened(folder)
    readers = [alone] if alone else [run for name in run_names(folder) if (run := _opened(folder / name))]
    if not readers:
        raise StoreError(
            f"There is no run at {folder}: expected a folder with config.json, or a folder of seeds as `ntkgen cl-run` "
            "makes it, found neither. Is it another path? Check it."
        )
    readers.sort(key=lambda run: (run.settings.width or 0, run.settings.seed))
    runs: dict[Key, RunReader] = {}
    for run in readers:
        _require_comparable(readers[0], run)
        key = run.settings.width, run.settings.seed
        if key in runs:
            raise FingerprintError(
                f"Two runs at {folder} have the same width and seed: expected one, found {runs[key].folder} and "
                f"{run.folder}. Was the command repeated with more widths? Move one of the two to another folder."
            )
        runs[key] = run
    return RunCollection(folder, runs)


def _opened(folder: Folder) -> RunReader | None:
    config = read_config(folder)
    return None if config is None else RunReader(folder, RunSettings.from_json(config["settings"]))


def _require_comparable(first: RunReader, other: RunReader) -> None:
    differing = first.settings.differences_beside_seed(other.settings)
    if first.config["facts"].get("data") != other.config["facts"].get("data"):
        differing.append("other data")
    if differing:
        raise FingerprintError(
            f"The runs {first.folder} and {other.folder} cannot be read together: expected that they differ only in "
            f"seed and width, found other settings ({'; '.join(differing[:3])}). Did two commands of "
            "`ntkgen cl-run` have the same folder? Name the folder of one run."
        )
