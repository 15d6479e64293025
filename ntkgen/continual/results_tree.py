"""Results as a tree of metric directories, as the code of incremental CIFAR-100 writes them.

    EXPERIMENT/
      experiment_indices.npy               indices of all runs, sorted
      config_files/index-N.json            settings
      class_order/index-N.npy              classes in the order in which they arrive
      model_parameters/index-N_epoch-E.pt  parameters at the end of each task, before a reset
      train_loss_per_checkpoint/, train_accuracy_per_checkpoint/          means over 25 iterations
      test_loss_per_epoch/, test_accuracy_per_epoch/, validation_…/       on the classes seen so far
      evaluated_on/index-N.txt             the samples of test_…: without a test split, the validation samples
      epoch_runtime/, test_evaluation_runtime/, validation_evaluation_runtime/   seconds

and, if the plasticity of the runs was measured, one number for each task, from before its training:

      weight_magnitude_analysis/
      {next_task,previous_tasks}_{dormant_units,effective_rank,stable_rank}_analysis/
      accuracy_per_class_in_order/         of the final network, on each class

All numbers are float32, one array per run. The layout is that of Dohare et al. (2024, Nature 632), so that scripts for
its results read ours. What resumes a run stays in its own folder.
"""

import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray

from ntkgen.continual.reader import RunReader
from ntkgen.continual.streams.views import PREVIOUS, VIEWS
from ntkgen.errors import StoreError
from ntkgen.files.folder import Folder

INDICES = "experiment_indices.npy"
_CONFIG, _ARRAY = re.compile(r"config_files/index-(\d+)\.json"), re.compile(r"/index-(\d+)\.npy$")
# The measured seconds of a run, and their names in the tree.
RUNTIMES = {
    "epoch": "epoch_runtime",
    "evaluation": "test_evaluation_runtime",
    "validation": "validation_evaluation_runtime",
}
# What is measured of the units, by its name in the tree. The published "stable rank" is the rank of 99 %.
OF_UNITS = {"dormant_units": "dormant_units", "effective_rank": "effective_rank", "stable_rank": "rank_99"}
WEIGHTS, BY_CLASS = "weight_magnitude_analysis", "accuracy_per_class_in_order"
EVALUATED_ON, TEST = "evaluated_on", "test samples"


def write_results_tree(folder: Folder, run: RunReader, index: int, seconds: Mapping[str, Sequence[float]]) -> None:
    """Write the results of a finished run.

    Args:
        folder: The folder of the experiment.
        run: The run.
        index: Its experiment index.
        seconds: The seconds of each epoch and evaluation; see `RUNTIMES`.

    Raises:
        StoreError: If the run is not finished, or was not evaluated after every epoch.
    """
    for name, values in {**curves(run), **_runtimes(run, seconds)}.items():
        folder.write(f"{name}/index-{index}.npy", _npy(values.astype(np.float32)))
    folder.write(f"class_order/index-{index}.npy", _npy(np.asarray(run.evaluations.class_order.values, np.int64)))
    folder.write(f"{EVALUATED_ON}/index-{index}.txt", f"{run.evaluated_on}\n".encode())
    folder.write(f"config_files/index-{index}.json", json.dumps(run.config["settings"], indent=1).encode())
    for epoch, name in enumerate(["start", *(f"task{task}" for task in range(run.num_tasks))]):
        parameters = run.folder.read(f"models/{name}.pt")
        assert parameters is not None
        folder.write(f"model_parameters/index-{index}_epoch-{epoch * run.settings.epochs}.pt", parameters)
    known = indices(folder)
    folder.write(INDICES, _npy(np.unique([*known, index])))


def write_analysis(folder: Folder, index: int, plasticity: xarray.Dataset) -> None:
    """Write the measured plasticity of a finished run.

    Args:
        folder: The folder of the experiment.
        index: The experiment index of the run.
        plasticity: What `RunReader.plasticity` gives.
    """
    for name, values in published_arrays(plasticity).items():
        folder.write(f"{name}/index-{index}.npy", _npy(values.astype(np.float32)))


def published_arrays(plasticity: xarray.Dataset) -> dict[str, npt.NDArray[np.float64]]:
    """Name the measured plasticity as the published analysis does, and take its entries.

    An entry is of the network before a task, so the last boundary has none. The first entry of the previous tasks is 0.
    """
    before = plasticity.isel(boundary=slice(None, -1))
    found = {WEIGHTS: np.asarray(before.weight_magnitude.values)}
    for view in VIEWS:
        for published, name in OF_UNITS.items():
            values = np.array(before[f"{view}_{name}"].values)
            if view == PREVIOUS:
                values[0] = 0
            found[f"{view}_{published}_analysis"] = values
    if "class_accuracy" in plasticity:
        found[BY_CLASS] = np.asarray(plasticity.class_accuracy.values)
    return found


def index_of(run: RunReader) -> tuple[Folder, int] | None:
    """Find the tree that a run belongs to, and its experiment index there; None if there is none.

    The folder of the run is in that of the tree, and a file of settings in the tree has the seed of the run.
    """
    folder = run.folder.parent
    for key, settings in configurations(folder).items():
        if settings.get("seed") == run.settings.seed:
            return folder, key
    return None


def configurations(folder: Folder) -> dict[int, dict[str, Any]]:
    """Read the settings of the runs in a tree, by their experiment indices."""
    names = {key: found for key in folder.sizes("config_files") if (found := _CONFIG.fullmatch(key))}
    return {int(found[1]): json.loads(folder.read(key) or b"{}") for key, found in names.items()}


def read_metric(folder: Folder, name: str) -> dict[int, npt.NDArray[np.float64]]:
    """Read the arrays of a metric directory, by their experiment indices."""
    names = {key: found for key in folder.sizes(name) if (found := _ARRAY.search(key))}
    return {
        int(found[1]): np.asarray(np.load(io.BytesIO(folder.read(key) or b"")), np.float64)
        for key, found in names.items()
    }


def evaluated_on(folder: Folder) -> str:
    """Say on which samples the runs in a tree are evaluated. The published code has a test split."""
    found = {(folder.read(key) or b"").decode().strip() for key in folder.sizes(EVALUATED_ON)}
    return "; ".join(sorted(found)) or TEST


def indices(folder: Folder) -> list[int]:
    """List the indices of the runs in a tree. The published code writes a single one without an axis."""
    found = folder.read(INDICES)
    return [] if found is None else np.atleast_1d(np.load(io.BytesIO(found))).tolist()


def curves(run: RunReader) -> dict[str, npt.NDArray[np.float64]]:
    """Compute the curves of training, test and validation of a finished run, (epochs,) or (windows,) each.

    Raises:
        StoreError: If the run is not finished, or was not evaluated after every epoch.
    """
    epochs, ends = run.epochs, run.epochs.values("iteration")
    data = run.evaluations
    places = np.searchsorted(data.iteration.values, ends)
    is_complete = len(ends) == run.num_tasks * run.settings.epochs and run.num_finished == run.num_tasks
    if not is_complete or not np.isin(ends, data.iteration.values).all():
        raise StoreError(
            f"The run at {run.folder} has no curves: expected {run.num_tasks} finished tasks with an evaluation after "
            f"each of {run.settings.epochs} epochs, found {run.num_finished} tasks and {len(ends)} epochs. Is it still "
            "at work, or has it rarer `evaluations`? Finish it, or evaluate after each epoch."
        )
    found = {f"train_{name}_per_checkpoint": epochs.windows(name) for name in ("loss", "accuracy")}
    counts, tasks = run.num_held_out, epochs.values("task").astype(int)
    for name in ("loss", "accuracy"):
        rows = np.asarray(data[name].values)[places]
        for line in epochs.selected:  # the evaluation at the end of a task is that of its best epoch
            rows[(line["task"] + 1) * run.settings.epochs - 1] = _numbers(line[name])
        means = [np.average(row[: task + 1], weights=counts[: task + 1]) for row, task in zip(rows, tasks, strict=True)]
        found[f"test_{name}_per_epoch"] = np.array(means)
        found[f"validation_{name}_per_epoch"] = epochs.values(f"validation_{name}")
    return found


def _runtimes(run: RunReader, seconds: Mapping[str, Sequence[float]]) -> dict[str, npt.NDArray[np.float64]]:
    count = len(run.epochs.lines)
    found = {}
    for name, title in RUNTIMES.items():
        values = np.array(seconds.get(name, ()), np.float64)[-count:]  # the first evaluation is that before training
        found[title] = np.concatenate([np.full(count - len(values), np.nan), values])
    return found


def _numbers(values: Sequence[Any]) -> list[float]:
    return [np.nan if value is None else value for value in values]


def _npy(values: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()
