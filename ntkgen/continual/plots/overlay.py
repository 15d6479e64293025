"""The pictures of several runs: means over seeds with their spread as bands, most of them for all widths."""

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt

from ntkgen.analysis.plots.style import LINES, Picture, legend, new_axes, styled
from ntkgen.continual.reading import RunCollection
from ntkgen.units import counted

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes

FloatArray = npt.NDArray[np.float64]
BANDS = "Lines are means over the seeds, bands are ± one standard deviation"
# Opacity of a band.
OPACITY = 0.22


def draw_collection(runs: RunCollection) -> list[Picture]:
    """Draw all pictures of several runs: the accuracy per task for each width, and the others with all widths."""
    kernels = runs.kernel_metrics()
    return [
        *(draw_tasks(runs, width) for width in runs.widths if _seeds(runs, width)),
        draw_average(runs),
        draw_overlay(runs, kernels, ("norm", "Norm of the kernel", "‖K‖$_F$ of the whole probe", "frobenius_norm")),
        draw_overlay(runs, kernels, ("distance", "Distance from the first kernel", "1 − cosine", "distance")),
        draw_overlay(runs, kernels, ("velocity", "Velocity of the kernel", "distance per iteration", "velocity")),
    ]


def draw_tasks(runs: RunCollection, width: int | None) -> Picture:
    """Draw the accuracy on each task over the iterations, for one width."""
    data = _of_width(runs, runs.evaluations, width)
    iterations = _mean(data.iteration)
    starts = _switches(data)
    with styled():
        figure, axes = new_axes(2)
        for panel, name, title in zip(
            axes, ("accuracy", "task_accuracy"), ("Over all outputs", "Over the outputs of the task"), strict=True
        ):
            values = 100 * np.asarray(data[name].transpose("seed", "evaluation", "task").values)
            for task, start in enumerate(starts):
                since = iterations > start  # as the pictures of one run: what a task has learned
                style = _style(task, len(starts), int(since.sum()))
                _draw_band(panel, iterations[since], values[:, since, task], f"task {task}", style)
            _mark(panel, starts)
            panel.set(title=title, xlabel="iteration", ylabel="accuracy, %", ylim=(-3, 103))
        legend(axes[0])
    several = len(runs.widths) > 1
    of = f" for the width {width}" if several else ""
    caption = f"Accuracy on the held-out samples of each task{of}. {BANDS} ({_counts(runs, [width])})."
    return Picture(f"accuracy-width{width}" if several else "accuracy", f"Accuracy{of}", caption, figure)


def draw_average(runs: RunCollection) -> Picture:
    """Draw the average accuracy on the tasks seen so far over the iterations, with a line per width."""
    data = runs.evaluations
    is_seen = np.arange(data.sizes["task"]) <= data.trained_task.expand_dims(task=data.sizes["task"], axis=-1)
    average = 100 * data.accuracy.where(is_seen).mean("task")
    shown = average.to_dataset(name="average").assign_coords(iteration=data.iteration, trained_task=data.trained_task)
    with styled():
        figure, (axes,) = new_axes()
        _draw_widths(axes, runs, shown, "average", "iteration")
        axes.set(xlabel="iteration", ylabel="average accuracy, %", ylim=(-3, 103))
        legend(axes)
    caption = (
        "Average accuracy over all outputs, on the held-out samples of the tasks seen so far. "
        f"{BANDS} ({_counts(runs, runs.widths)})."
    )
    return Picture("average-accuracy", "Average accuracy", caption, figure)


def draw_overlay(runs: RunCollection, kernels: "xarray.Dataset", what: tuple[str, str, str, str]) -> Picture:
    """Draw a metric of the kernel of the whole probe over the iterations, with a line per width.

    Args:
        runs: The runs.
        kernels: The metrics of their kernels.
        what: The kind and the title of the picture, the label of the axis, and the name of the metric.
    """
    kind, title, label, name = what
    where = "start" if "start" in kernels[name].dims else "iteration"
    with styled():
        figure, (axes,) = new_axes()
        lowest = _draw_widths(axes, runs, kernels, name, where)
        axes.set(xlabel="iteration", ylabel=label)
        if lowest is not None and name != "distance":
            axes.set_yscale("log")
            axes.set_ylim(bottom=lowest / 1.5)
        legend(axes)
    unit = f" of kernels that are {kernels.attrs['dt']:,} iterations apart" if name == "velocity" else ""
    caption = f"{title}{unit}. {BANDS} ({_counts(runs, runs.widths)})."
    return Picture(kind, title, caption, figure)


def _draw_widths(axes: "Axes", runs: RunCollection, data: "xarray.Dataset", name: str, where: str) -> float | None:
    """Draw a line with its band for each width, and mark the switches. Return the smallest positive mean."""
    lowest = None
    shown = [width for width in runs.widths if _seeds(runs, width)]
    for index, width in enumerate(shown):
        own = _of_width(runs, data, width)
        x = _mean(own[where])
        values = np.asarray(own[name].transpose("seed", ...).values, np.float64)
        label = "default width" if width is None else f"width {width}"
        means = _draw_band(axes, x, values, label, _style(index, len(shown), len(x)))
        positive = means[means > 0]
        if len(positive):
            lowest = min(float(positive.min()), lowest or np.inf)
    _mark(axes, _switches(_of_width(runs, runs.evaluations, shown[0])))
    return lowest


def _draw_band(axes: "Axes", x: FloatArray, values: FloatArray, label: str, style: dict[str, Any]) -> FloatArray:
    """Draw the mean over seeds, (seeds, times), and the band of one standard deviation. Return the mean."""
    mean = np.asarray(values.mean(0))
    axes.plot(x, mean, label=label, **style)
    if len(values) > 1:
        deviation = values.std(0, ddof=1)
        axes.fill_between(x, mean - deviation, mean + deviation, color=style["color"], alpha=OPACITY, linewidth=0)
    return mean


def _seeds(runs: RunCollection, width: int | None) -> list[int]:
    return [seed for of, seed in runs.complete if of == width]


def _of_width(runs: RunCollection, data: "xarray.Dataset", width: int | None) -> "xarray.Dataset":
    """Take the complete runs of a width."""
    own = data.sel(width=width) if "width" in data.dims else data
    return own.sel(seed=_seeds(runs, width))


def _mean(values: "xarray.DataArray") -> FloatArray:
    """Average a coordinate over seeds, if it differs between them."""
    return np.asarray(values.mean("seed").values if "seed" in values.dims else values.values, np.float64)


def _switches(data: "xarray.Dataset") -> list[float]:
    """List the iterations at which the tasks begin."""
    iterations, trained = _mean(data.iteration), _mean(data.trained_task)
    tasks = np.unique(trained[~np.isnan(trained)].astype(int))
    ends = [float(np.nanmax(iterations[trained <= task])) for task in tasks]
    return [0.0, *ends[:-1]]


def _mark(axes: "Axes", switches: list[float]) -> None:
    for iteration in switches[1:]:
        axes.axvline(iteration, color="0.45", linestyle=":", linewidth=0.9, zorder=0)


def _style(index: int, count: int, num_points: int) -> dict[str, Any]:
    """Choose a line style; of many lines, lightness increases with the index."""
    line = LINES[index % len(LINES)].style(num_points)
    return line if count <= len(LINES) else {**line, "color": mpl.colormaps["cividis"](0.85 * index / (count - 1))}


def _counts(runs: RunCollection, widths: list[int | None]) -> str:
    """Say how many seeds there are.

    If widths have different numbers of seeds, each is named.
    """
    counts = {width: len(_seeds(runs, width)) for width in widths if _seeds(runs, width)}
    if len(set(counts.values())) == 1:
        number = next(iter(counts.values()))
        return f"{number} seeds" if number > 1 else "one seed, without a band"
    return "; ".join(f"width {width}: {counted(number, 'seed')}" for width, number in counts.items())
