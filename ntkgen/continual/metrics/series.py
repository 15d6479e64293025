"""Metrics of every recorded kernel of a run, as one data set."""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from ntkgen.continual.metrics import kernels as measure
from ntkgen.continual.metrics.kernels import Spectrum

if TYPE_CHECKING:
    import xarray


# The spectrum of a block without any rows that have values.
_MISSING = Spectrum(**{field.name: float("nan") for field in dataclasses.fields(Spectrum)})  # type: ignore[arg-type]


def kernel_metrics(kernels: "xarray.Dataset", dt: int | None = None) -> "xarray.Dataset":
    """Measure every kernel of a run.

    Args:
        kernels: The recorded kernels, as `RunReader.kernels` gives them.
        dt: Iterations between the two kernels of a velocity; None for the most frequent number.

    Returns:
        Numbers of `Spectrum` for each time, for the whole probe and, with the prefix ``task_``, for the block of each
        task; ``distance`` from the first kernel; ``alignment`` and ``centred_alignment`` with the labels; the
        ``interference`` of each two tasks; ``velocity`` and ``angular_velocity`` at the iterations where a pair begins.
    """
    import xarray

    iterations, tasks = kernels.iteration.values, kernels.row_task.values
    labels = kernels.row_label.values
    values = [_values(kernels, time) for time in range(len(iterations))]
    whole = [Spectrum.of(K[np.ix_(kept, kept)]) for K, kept in values]
    numbers = np.unique(tasks)
    data: dict[str, Any] = {name: (("time",), [getattr(each, name) for each in whole]) for name in vars(whole[0])}
    blocks = [[_block(K, kept & (tasks == number)) for number in numbers] for K, kept in values]
    data |= {
        f"task_{name}": (("time", "task"), [[getattr(each, name) for each in row] for row in blocks])
        for name in ("frobenius_norm", "largest", "smallest", "trace")
    }
    first, common = values[0]
    data["distance"] = ("time",), [_distance(first, K, common & kept) for K, kept in values]
    for name, centred in (("alignment", False), ("centred_alignment", True)):
        data[name] = ("time",), [_alignment(K, kept, labels, kernels, centred=centred) for K, kept in values]
    plain = np.stack([np.where(np.isnan(K), 0, K) for K, _ in values])
    data["interference"] = (
        ("time", "task", "other_task"),
        [measure.interference(K, tasks) for K in plain],
    )
    step = dt or measure.usual_step(iterations)
    starts, speed, angular = measure.velocity(plain, iterations, step)
    data |= {"velocity": (("start",), speed), "angular_velocity": (("start",), angular)}
    coordinates = {
        "iteration": ("time", iterations),
        "trained_task": ("time", kernels.task.values),
        "task": numbers,
        "start": starts,
    }
    return xarray.Dataset(data, coordinates, {"dt": step})


def _values(kernels: "xarray.Dataset", time: int) -> tuple[measure.FloatArray, "np.typing.NDArray[np.bool_]"]:
    """Read a kernel, and say which of its rows have values."""
    K = np.asarray(kernels.kernel[time].values, np.float64)
    return K, ~np.isnan(np.diagonal(K))


def _block(K: measure.FloatArray, rows: "np.typing.NDArray[np.bool_]") -> Spectrum:
    return Spectrum.of(K[np.ix_(rows, rows)]) if rows.any() else _MISSING


def _distance(first: measure.FloatArray, K: measure.FloatArray, rows: "np.typing.NDArray[np.bool_]") -> float:
    return measure.distance(first[np.ix_(rows, rows)], K[np.ix_(rows, rows)])


def _alignment(
    K: measure.FloatArray,
    kept: "np.typing.NDArray[np.bool_]",
    labels: measure.IntArray,
    kernels: "xarray.Dataset",
    *,
    centred: bool,
) -> float:
    """Align with the labels; NaN where outputs are missing, or the rows are other outputs than the classes."""
    num_outputs = int(kernels.row_output.values.max()) + 1
    if not kept.all():
        return float("nan")
    return measure.label_alignment(K, labels[::num_outputs], num_outputs, centred=centred)
