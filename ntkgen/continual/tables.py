"""Everything that a run has recorded beside its kernels, and every metric, as tables in the format CSV."""

from collections.abc import Mapping

import xarray

from ntkgen.continual.joining import Key, joined
from ntkgen.continual.reading import SCORES, RunCollection, RunReader

# Names of the tables, by the dimensions of their values. Dimensions that tell runs apart are added.
NAMES = {
    ("evaluation", "task"): "accuracy",
    ("after_task", "task"): "matrix",
    ("task_end", "target", "predicted"): "confusion",
    ("time",): "kernels",
    ("time", "task"): "kernels-of-tasks",
    ("time", "task", "other_task"): "interference",
    ("start",): "velocity",
    ("time", "rank_tolerance"): "numerical-rank",
}
OF_RUNS = ("width", "seed")
# What is measured at boundaries has tables of its own for these dimensions.
ENDINGS = {"target": "-of-classes", "rank_tolerance": "-numerical-rank"}


def csv_tables(
    run: RunReader | RunCollection, kernels: xarray.Dataset, measured: Mapping[str, xarray.Dataset]
) -> dict[str, bytes]:
    """Write the tables of a run, or of several, by their names.

    Args:
        run: The run.
        kernels: The metrics of its kernels.
        measured: What is measured at boundaries, by name.
    """
    found: dict[str, bytes] = {}
    for data in (run.evaluations, _matrices(run), kernels):
        for dims, name in NAMES.items():
            chosen = [each for each in data.data_vars if _dims(data[each]) == dims]
            if chosen:
                found[name] = as_csv(data[chosen])
    for name, data in measured.items():
        for dims in dict.fromkeys(_dims(values) for values in data.data_vars.values()):
            alike = [each for each in data.data_vars if _dims(data[each]) == dims]
            found[name.replace("_", "-") + ENDINGS.get(dims[-1], "")] = as_csv(data[alike])
    return found


def of_several(measured: Mapping[Key, Mapping[str, xarray.Dataset]]) -> dict[str, xarray.Dataset]:
    """Join what is measured at the boundaries of several runs, by name."""
    result = {}
    for name, first in next(iter(measured.values())).items():
        found = {key: each[name] for key, each in measured.items()}
        task = "boundary" if "boundary" in first.coords else "trained_task"
        result[name] = joined(found, "time", task) if "time" in first.dims else joined(found)
    return result


def as_csv(data: xarray.Dataset) -> bytes:
    """Write a data set as one table with a row for each entry of its arrays, and its coordinates as columns."""
    return str(data.to_dataframe().to_csv()).encode()


def _dims(values: xarray.DataArray) -> tuple[str, ...]:
    return tuple(str(dim) for dim in values.dims if dim not in OF_RUNS)


def _matrices(run: RunReader | RunCollection) -> xarray.Dataset:
    """Take the accuracy matrices, class-incremental and task-incremental."""
    if isinstance(run, RunCollection):
        matrices = run.metrics()["accuracy_matrix"]
        return xarray.Dataset({str(kind): matrices.sel(scores=kind, drop=True) for kind in matrices.scores.values})
    values = {name: (("after_task", "task"), run.matrix(measure).values) for name, measure in SCORES.items()}
    return xarray.Dataset(values)
