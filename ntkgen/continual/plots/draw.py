"""The pictures of one run: accuracy and kernels over time, the accuracy matrix, and the blocks of each two tasks."""

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt

from ntkgen.analysis.plots.style import LINES, Picture, legend, new_axes, plain, styled
from ntkgen.continual.reading import RunReader

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes

FloatArray = npt.NDArray[np.float64]
KINDS = ("accuracy", "loss", "norm", "eigenvalues", "motion", "matrix", "interference")
# Numbers are written into the cells of a matrix of at most this many tasks.
MAX_LABELLED = 10


def draw_run(run: RunReader) -> list[Picture]:
    """Draw all pictures of a run, in the order of `KINDS`."""
    kernels = run.kernel_metrics()
    return [
        draw_accuracy(run),
        draw_loss(run),
        draw_norm(run, kernels),
        draw_eigenvalues(run, kernels),
        draw_motion(run, kernels),
        draw_matrix(run),
        draw_interference(kernels),
    ]


def draw_accuracy(run: RunReader) -> Picture:
    """Draw the accuracy on each task over the iterations, class-incremental and task-incremental."""
    data = run.evaluations
    with styled():
        figure, axes = new_axes(2)
        for panel, name, title in zip(
            axes, ("accuracy", "task_accuracy"), ("Over all outputs", "Over the outputs of the task"), strict=True
        ):
            _draw_tasks(panel, run, data.iteration.values, 100 * np.asarray(data[name].values))
            panel.set(title=title, xlabel="iteration", ylabel="accuracy, %", ylim=(-3, 103))
        legend(axes[0])
    found = run.matrix()
    caption = (
        f"Accuracy on the held-out samples of each task. Dotted lines mark the switches between tasks. After the last "
        f"finished task the average accuracy over all outputs is {100 * found.average_accuracy:.1f} %."
    )
    return Picture("accuracy", "Accuracy", caption, figure)


def draw_loss(run: RunReader) -> Picture:
    """Draw the loss on each task over the iterations."""
    data = run.evaluations
    with styled():
        figure, (axes,) = new_axes()
        _draw_tasks(axes, run, data.iteration.values, np.asarray(data.loss.values))
        axes.set(xlabel="iteration", ylabel="cross-entropy, nats", yscale="log")
        legend(axes)
    caption = "Mean cross-entropy on the held-out samples of each task, over all outputs."
    return Picture("loss", "Loss", caption, figure)


def draw_norm(run: RunReader, kernels: "xarray.Dataset") -> Picture:
    """Draw the norm of the kernel of each task over the iterations."""
    with styled():
        figure, (axes,) = new_axes()
        _draw_tasks(axes, run, kernels.iteration.values, np.asarray(kernels.task_frobenius_norm.values))
        axes.set(xlabel="iteration", ylabel="‖K‖ of the task's probe", yscale="log")
        legend(axes)
    first, last = (float(kernels.frobenius_norm.values[time]) for time in (0, -1))
    caption = (
        f"Frobenius norm of the kernel on the probe samples of each task. The norm on the whole probe changed from "
        f"{plain(first)} to {plain(last)}."
    )
    return Picture("norm", "Norm of the kernel", caption, figure)


def draw_eigenvalues(run: RunReader, kernels: "xarray.Dataset") -> Picture:
    """Draw the extreme eigenvalues of the kernel of each task over the iterations."""
    with styled():
        figure, axes = new_axes(2)
        for panel, name, title in zip(axes, ("task_largest", "task_smallest"), ("Largest", "Smallest"), strict=True):
            values = np.asarray(kernels[name].values, np.float64)
            _draw_tasks(panel, run, kernels.iteration.values, np.where(values > 0, values, np.nan))
            panel.set(title=title, xlabel="iteration", ylabel="eigenvalue", yscale="log")
        legend(axes[0])
    caption = (
        "Extreme eigenvalues of the kernel on the probe samples of each task. Those that are not positive are left out."
    )
    return Picture("eigenvalues", "Extreme eigenvalues", caption, figure)


def draw_motion(run: RunReader, kernels: "xarray.Dataset") -> Picture:
    """Draw the distance from the first kernel, the alignment with the labels, and the velocity."""
    iterations = kernels.iteration.values
    with styled():
        figure, (left, right) = new_axes(2)
        for name, label, line in zip(
            ("distance", "centred_alignment"),
            ("distance from the first kernel", "alignment with labels"),
            LINES,
            strict=False,
        ):
            left.plot(iterations, kernels[name].values, label=label, **line.style(len(iterations)))
        right.plot(kernels.start.values, kernels.velocity.values, **LINES[0].style(len(kernels.start)))
        left.set(title="Position", xlabel="iteration", ylabel="1 − cosine; centred cosine")
        right.set(title="Velocity", xlabel="iteration", ylabel="distance per iteration")
        for axes in (left, right):
            _mark_switches(axes, run)
        legend(left)
    caption = (
        f"Motion of the kernel of the whole probe. A velocity is the distance of two kernels that are "
        f"{kernels.attrs['dt']:,} iterations apart, divided by this number."
    )
    return Picture("motion", "Motion of the kernel", caption, figure)


def draw_matrix(run: RunReader) -> Picture:
    """Draw the accuracy matrix R."""
    values = run.matrix().values
    with styled():
        figure, (axes,) = new_axes()
        _draw_cells(axes, 100 * values, "accuracy, %", (0, 100))
        axes.set(xlabel="accuracy on task", ylabel="after task")
    caption = "Accuracy on each task, over all outputs, after the training on each task."
    return Picture("matrix", "Accuracy matrix", caption, figure)


def draw_interference(kernels: "xarray.Dataset") -> Picture:
    """Draw the interference of each two tasks before and after the training."""
    values = np.asarray(kernels.interference.values)
    with styled():
        figure, axes = new_axes(2)
        for panel, time, title in zip(axes, (0, -1), ("At the beginning", "At the end"), strict=True):
            _draw_cells(panel, values[time], "", (0, max(1.0, float(values.max()))))
            panel.set(title=title, xlabel="task", ylabel="task")
    caption = (
        "Norm of the block of the kernel between the probes of two tasks, divided by the root of the product of the "
        "norms of their own blocks."
    )
    return Picture("interference", "Interference of tasks", caption, figure)


def _draw_tasks(axes: "Axes", run: RunReader, iterations: npt.NDArray[np.int64], values: FloatArray) -> None:
    """Draw one line per task, from its first training on."""
    starts = _switches(run)
    for task in range(values.shape[1]):
        since = iterations >= starts[task] if task < len(starts) else np.zeros(len(iterations), bool)
        axes.plot(
            iterations[since], values[since, task], label=f"task {task}", **_style(task, values.shape[1], since.sum())
        )
    _mark_switches(axes, run)


def _style(task: int, num_tasks: int, num_points: int) -> dict[str, Any]:
    """Choose a line style: lightness increases with the task, and dashes and markers alternate."""
    line = LINES[task % len(LINES)]
    if num_tasks <= len(LINES):
        return line.style(num_points)
    color = mpl.colormaps["cividis"](0.85 * task / (num_tasks - 1))
    return {**line.style(num_points), "color": color}


def _switches(run: RunReader) -> list[int]:
    """List the iterations at which the tasks begin."""
    data = run.evaluations
    trained, iterations = data.trained_task.values, data.iteration.values
    ends = [int(iterations[trained == task].max()) for task in np.unique(trained)]
    return [0, *ends[:-1]]


def _mark_switches(axes: "Axes", run: RunReader) -> None:
    for iteration in _switches(run)[1:]:
        axes.axvline(iteration, color="0.45", linestyle=":", linewidth=0.9, zorder=0)


def _draw_cells(axes: "Axes", values: FloatArray, label: str, limits: tuple[float, float]) -> None:
    image = axes.imshow(values, vmin=limits[0], vmax=limits[1], aspect="auto")
    axes.grid(visible=False)
    axes.set(xticks=range(values.shape[1]), yticks=range(len(values)))
    if max(values.shape) <= MAX_LABELLED:
        for (row, col), value in np.ndenumerate(values):
            is_dark = value < (limits[0] + limits[1]) / 2
            text = f"{value:.0f}" if limits[1] > 2 else f"{value:.2f}"
            axes.text(col, row, text, ha="center", va="center", fontsize=8, color="white" if is_dark else "black")
    axes.figure.colorbar(image, ax=axes, label=label)
