"""Results of several algorithms over tasks: folders of runs, or trees of metric directories as published code has them.

    RESULTS/ALGORITHM/seedS/                    a run of `ntkgen cl-run`
    RESULTS/ALGORITHM/METRIC/index-N.npy        a tree; see `ntkgen.continual.results_tree`

A folder with runs is read as runs. Metrics have the names of the published analysis. Its metrics per epoch are numbers
per task here: the test accuracy of the parameters with which the task ends.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ntkgen.continual.metrics.over_tasks import Curve, of_selected_epochs
from ntkgen.continual.metrics.series import kernel_metrics
from ntkgen.continual.reading import RunReader, open_collection, run_names
from ntkgen.continual.results_tree import (
    OF_UNITS,
    TEST,
    WEIGHTS,
    configurations,
    evaluated_on,
    published_arrays,
    read_metric,
)
from ntkgen.continual.streams.incremental import Split
from ntkgen.continual.streams.views import NEXT, PREVIOUS, VIEWS
from ntkgen.errors import InputError, StoreError, UnknownNameError
from ntkgen.files.folder import Folder

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

RELATIVE, ACCURACY, LOSS = "relative_accuracy_per_epoch", "test_accuracy_per_epoch", "test_loss_per_epoch"
KERNEL_RANK, KERNEL_DISTANCE = "kernel_effective_rank", "kernel_distance"
UNITS = {view: tuple(f"{view}_{name}_analysis" for name in OF_UNITS) for view in VIEWS}
METRICS = (RELATIVE, ACCURACY, LOSS, WEIGHTS, *UNITS[NEXT], *UNITS[PREVIOUS], KERNEL_RANK, KERNEL_DISTANCE)
"""All metrics, in the order of their pictures."""
RANKS = tuple(name for name in METRICS if name.endswith("rank_analysis"))
BASELINE = "retrained_network"

# The published experiment, whose configurations do not say it: classes, tasks, epochs of a task, features.
PUBLISHED: dict[str, Any] = {"classes": 100, "split": "5/5", "epochs": 200, "features": 512}
# The first folder of a path is an algorithm if a run or a metric directory is below it.
_RESULT = re.compile(r"([^/]+)/(?:(?:width\d+/)?seed\d+/config\.json|\w+_(?:per_epoch|analysis)/index-\d+\.npy)")


@dataclass(frozen=True, eq=False)
class Results:
    """What one algorithm achieves.

    Attributes:
        name: The algorithm.
        values: By metric and seed, or experiment index, a value for each point: after each task for accuracy and loss,
            before each task for the units on the next task, after each task for those on the previous tasks, and at
            each boundary, from the beginning on, for weights and kernels.
        num_seen: Number of classes after each task, (tasks,).
        num_features: Units of the last hidden layer; None if it is not known.
        evaluated_on: The samples of the metrics of the test, in words.
    """

    name: str
    values: Mapping[str, Mapping[int, FloatArray]]
    num_seen: IntArray
    num_features: int | None
    evaluated_on: str = TEST

    def classes(self, metric: str) -> IntArray:
        """Number of classes at each point of a metric. A point of a next task has the classes of this task too."""
        at_boundaries = metric in {WEIGHTS, KERNEL_RANK, KERNEL_DISTANCE}
        return np.array([0, *self.num_seen]) if at_boundaries else self.num_seen


def list_algorithms(folder: Folder) -> list[str]:
    """List the algorithms that have results in a folder.

    Raises:
        StoreError: If there are none.
    """
    names = sorted({found[1] for key in folder.sizes() if (found := _RESULT.fullmatch(key))})
    if not names:
        raise StoreError(
            f"There are no results of algorithms at {folder}: expected a folder for each algorithm, with runs of "
            "`ntkgen cl-run` or metric directories, found none. Is it the folder of one algorithm? Name the one above."
        )
    return names


def read_results(folder: Folder, name: str) -> Results:
    """Read the results of an algorithm.

    Raises:
        StoreError: If there are none.
        InputError: If its runs have several widths.
    """
    if name not in (known := list_algorithms(folder)):
        raise StoreError(
            f"There are no results of {name!r} at {folder}: expected one of {', '.join(known)}. Is it not run yet, or "
            "spelled in another way? The folder of its runs gives an algorithm its name."
        )
    place = folder / name
    return _of_runs(place, name) if run_names(place) else _of_tree(place, name)


def curves_of(results: Sequence[Results], metric: str, baseline: Results | None = None) -> dict[str, Curve]:
    """Compute the curve of each algorithm that has values of a metric.

    Ranks are divided by the number of features if it is known of all algorithms.

    Args:
        results: The algorithms.
        metric: One of `METRICS`.
        baseline: The algorithm that relative accuracies are relative to.

    Raises:
        UnknownNameError: If there is no such metric.
        InputError: If a relative accuracy has no baseline, or a seed is missing there.
    """
    if metric not in METRICS:
        raise UnknownNameError("metric", metric, METRICS)
    source = ACCURACY if metric == RELATIVE else metric
    shown = [each for each in results if each.values.get(source)]
    if metric == RELATIVE:
        if baseline is None:
            raise InputError(
                f"The relative accuracy has no baseline: expected results of {BASELINE}, found none. Is it not run "
                "yet, or does its folder have another name? Name it with `baseline`."
            )
        own = baseline.values.get(ACCURACY, {})
        return {each.name: Curve.relative(each.num_seen, each.values[ACCURACY], own) for each in shown}
    divides = metric in RANKS and are_divided(shown)
    return {
        each.name: Curve.of(
            each.classes(metric),
            {seed: row / (each.num_features or 1) if divides else row for seed, row in each.values[metric].items()},
        )
        for each in shown
    }


def are_divided(results: Sequence[Results]) -> bool:
    """Whether ranks are divided by the number of features: if it is known of all algorithms."""
    return all(each.num_features for each in results)


# runs -----------------------------------------------------------------------------------------------------------------


def _of_runs(folder: Folder, name: str) -> Results:
    """Read the runs of an algorithm.

    Raises:
        InputError: If they have several widths.
    """
    runs = open_collection(folder)
    if len(runs.widths) > 1:
        raise InputError(
            f"The runs of {name} have several widths: expected one, found {', '.join(map(str, runs.widths))}. Each "
            "width is an algorithm of its own here. Move them to one folder per width."
        )
    values: dict[str, dict[int, FloatArray]] = {metric: {} for metric in METRICS}
    features = set()
    for (_, seed), run in runs.runs.items():
        for metric, row in _of_run(run).items():
            values[metric][seed] = row
        if run.has_plasticity:
            features.add(int(run.plasticity.attrs["ntkgen_plasticity"]["num_features"]))
    first = next(iter(runs.runs.values()))
    return Results(name, values, first.num_seen_classes, features.pop() if features else None, first.evaluated_on)


def _of_run(run: RunReader) -> dict[str, FloatArray]:
    found: dict[str, FloatArray] = {}
    if run.num_finished:
        found[ACCURACY] = run.matrix().seen_accuracy
        if run.has("loss"):
            found[LOSS] = run.matrix("loss").seen_accuracy  # the mean over the samples of all tasks so far
    if run.has_plasticity:
        plasticity = run.plasticity
        found |= {name: row for name, row in published_arrays(plasticity).items() if name in METRICS}
        found[WEIGHTS] = np.asarray(plasticity.weight_magnitude.values)  # with that of the end
        for metric, (_, own) in zip(UNITS[PREVIOUS], OF_UNITS.items(), strict=True):
            found[metric] = np.asarray(plasticity[f"{PREVIOUS}_{own}"].values)[1:]
    return found | _of_kernels(run)


def _of_kernels(run: RunReader) -> dict[str, FloatArray]:
    """Measure the kernels of the probe at the boundaries that have one. Many runs have none at the beginning."""
    kernels = run.kernels_of("train")
    iterations, wanted = kernels.iteration.values, run.boundary_iterations
    known = np.isin(wanted, iterations)
    if not known.any():
        return {}
    found = kernel_metrics(kernels.isel(time=np.searchsorted(iterations, wanted[known])))
    rank, moved = np.full((2, len(wanted)), np.nan)
    rank[known], moved[known] = found.effective_rank.values, found.previous_distance.values
    moved[1:][~known[:-1]] = np.nan  # the kernel before is not that of the boundary before
    return {name: row for name, row in {KERNEL_RANK: rank, KERNEL_DISTANCE: moved}.items() if np.isfinite(row).any()}


# trees ----------------------------------------------------------------------------------------------------------------


def _of_tree(folder: Folder, name: str) -> Results:
    """Read metric directories. Seeds are those of the settings, or the experiment indices."""
    settings = configurations(folder)
    shared = next(iter(settings.values()), {})
    epochs = int(shared.get("epochs", PUBLISHED["epochs"]))
    is_selected = shared.get("select") == "best" or bool(shared.get("early_stopping"))
    validation = read_metric(folder, "validation_accuracy_per_epoch") if is_selected else {}
    values: dict[str, dict[int, FloatArray]] = {}
    for metric in METRICS:
        rows = read_metric(folder, metric)
        if metric in {ACCURACY, LOSS}:
            rows = {index: of_selected_epochs(row, epochs, validation.get(index)) for index, row in rows.items()}
        elif metric in UNITS[PREVIOUS]:
            rows = {index: row[1:] for index, row in rows.items()}  # before the first task there are none
        values[metric] = {int(settings.get(index, {}).get("seed", index)): row for index, row in rows.items()}
    orders = read_metric(folder, "class_order")
    classes = len(next(iter(orders.values()))) if orders else PUBLISHED["classes"]
    sizes = Split.parse(str(shared.get("split", PUBLISHED["split"]))).sizes(classes)
    features = None if "model" in shared else PUBLISHED["features"]
    return Results(name, values, np.cumsum(sizes), features, evaluated_on(folder))
