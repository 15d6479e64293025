"""Pictures of what changes during a run: accuracy, loss, and the kernel."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ntkgen.analysis.plots.style import DARK, LINES, Picture, legend, new_axes, plain, styled
from ntkgen.continual.plots.axes import Timeline
from ntkgen.continual.reading import RunReader

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes

FloatArray = npt.NDArray[np.float64]
# Measures of the evaluations, and the titles of their panels.
SCORES = {"accuracy": "Over all outputs", "task_accuracy": "Over the outputs of the task"}
EXTREMES = {"Largest": "task_largest", "Smallest": "task_smallest"}
# Ratio of the largest and the smallest value above which an axis is logarithmic.
WIDE = 4
# Words for the parts of the probe.
PARTS = {"train": "training", "validation": "validation"}


def draw_accuracy(run: RunReader) -> Picture:
    """Draw the accuracy on each task, class-incremental and task-incremental."""
    data, timeline = run.evaluations, Timeline.of(run)
    shown = {name: title for name, title in SCORES.items() if run.has(name)}
    with styled():
        figure, axes = new_axes(len(shown))
        for panel, (name, title) in zip(axes, shown.items(), strict=True):
            timeline.draw_tasks(panel, data.epoch.values, 100 * np.asarray(data[name].values))
            panel.set(title=title, ylim=(-3, 103))
        axes[0].set(ylabel="accuracy, %")
        timeline.settle(axes)
        timeline.key(axes)
    caption = (
        "Accuracy on the held-out samples of each task. Dotted lines mark the switches between tasks. After the last "
        f"finished task the average accuracy over all outputs is {100 * run.matrix().average_accuracy:.1f} %."
    )
    return Picture("accuracy", "Accuracy", caption, figure)


def draw_loss(run: RunReader) -> Picture | None:
    """Draw the loss on each task; None if none was recorded."""
    if not run.has("loss"):
        return None
    data, timeline = run.evaluations, Timeline.of(run)
    with styled():
        figure, axes = new_axes()
        timeline.draw_tasks(axes[0], data.epoch.values, np.asarray(data.loss.values))
        axes[0].set(ylabel="cross-entropy, nats")
        _scale(axes[0])
        timeline.settle(axes)
        timeline.key(axes)
    caption = "Mean cross-entropy on the held-out samples of each task, over all outputs."
    return Picture("loss", "Loss", caption, figure)


def draw_norm(run: RunReader, parts: "Mapping[str, xarray.Dataset]") -> Picture:
    """Draw the norm of the kernel of each task, for each part of the probe."""
    timeline = Timeline.of(run)
    with styled():
        figure, axes = new_axes(len(parts))
        for panel, (part, kernels) in zip(axes, parts.items(), strict=True):
            timeline.draw_tasks(panel, kernels.epoch.values, np.asarray(kernels.task_frobenius_norm.values))
            panel.set(title=f"On {PARTS[part]} samples" if len(parts) > 1 else "")
            _scale(panel)
        axes[0].set(ylabel="‖K‖$_F$ of the task's probe")
        timeline.settle(axes)
        timeline.key(axes)
    norms = parts["train"].frobenius_norm.values
    caption = "Frobenius norm of the kernel on the probe samples of each task."
    if np.isfinite(norms[-1]):
        first, last = (plain(float(norm)) for norm in (norms[0], norms[-1]))
        caption += f" The norm on the whole probe changed from {first} to {last}."
    return Picture("norm", "Norm of the kernel", caption, figure)


def draw_eigenvalues(run: RunReader, kernels: "xarray.Dataset", part: str) -> Picture:
    """Draw the extreme eigenvalues of the kernel of each task, for one part of the probe."""
    timeline = Timeline.of(run)
    shown = {title: kernels[name].where(kernels[name] > 0) for title, name in EXTREMES.items()}
    shown = {title: values for title, values in shown.items() if values.notnull().any()}
    with styled():
        figure, axes = new_axes(len(shown))
        for panel, (title, values) in zip(axes, shown.items(), strict=True):
            timeline.draw_tasks(panel, kernels.epoch.values, np.asarray(values.values, np.float64))
            panel.set(title=title)
            _scale(panel)
        axes[0].set(ylabel="eigenvalue")
        timeline.settle(axes)
        timeline.key(axes)
    caption = (
        f"Extreme eigenvalues of the kernel on the {PARTS[part]} samples of the probe of each task. Those that are not "
        f"positive are left out. Below N · {plain(kernels.attrs['rounding'])} times the largest one, where N is the "
        "number of rows, an eigenvalue is rounding."
    )
    kind = "eigenvalues" if part == "train" else f"{part}-eigenvalues"
    return Picture(kind, f"Extreme eigenvalues on {PARTS[part]} samples", caption, figure)


def draw_motion(run: RunReader, kernels: "xarray.Dataset") -> Picture:
    """Draw the distance from the first kernel, and the alignment with the labels."""
    with styled():
        figure, axes = new_axes(2)
        _draw_lines(axes[0], kernels.epoch.values, {"": kernels.distance.values})
        lines = {"alignment": kernels.alignment.values, "centred alignment": kernels.centred_alignment.values}
        _draw_lines(axes[1], kernels.epoch.values, lines)
        axes[0].set(title="Distance from the first kernel", ylabel="1 − cosine", ylim=(0, None))
        axes[1].set(title="Alignment with the labels", ylabel="cosine")
        Timeline.of(run).settle(axes)
        legend(axes[1])
    caption = "Distance of the kernel of the whole probe from the first kernel, and its alignment with the labels."
    return Picture("motion", "Motion of the kernel", caption, figure)


def draw_velocity(run: RunReader, kernels: "xarray.Dataset") -> Picture:
    """Draw the velocity and the angular velocity of the kernel, with the switches marked."""
    with styled():
        figure, axes = new_axes(2)
        for panel, name, title, unit in zip(
            axes,
            ("velocity", "angular_velocity"),
            ("Velocity", "Angular velocity"),
            ("distance per iteration", "radians per iteration"),
            strict=True,
        ):
            epochs, values = _broken(kernels, np.asarray(kernels[name].values, np.float64))
            panel.plot(epochs, values, color=DARK, marker=".")
            panel.set(title=title, ylabel=unit)
            _scale(panel)
        Timeline.of(run).settle(axes)
    caption = (
        f"Velocity of the kernel of the whole probe between two kernels that are {kernels.attrs['dt']:,} iterations "
        "apart: S / dt, and arccos(1 − S) / dt, where S is their distance. A point stands where a pair begins."
    )
    return Picture("velocity", "Velocity of the kernel", caption, figure)


def draw_lazy_error(run: RunReader, kernels: "xarray.Dataset") -> Picture:
    """Draw how far the outputs move from those of the linearised network."""
    names = {"lazy_error": "since the last kernel", "lazy_error_from_start": "since the first kernel"}
    lines = {title: kernels[name].where(kernels[name] > 0).values for name, title in names.items()}
    with styled():
        figure, axes = new_axes()
        _draw_lines(axes[0], kernels.epoch.values, lines)
        axes[0].set(ylabel="‖Δf − J Δθ‖ / ‖Δf‖")
        _scale(axes[0])
        Timeline.of(run).settle(axes)
        legend(axes[0])
    caption = (
        "Lazy error: the part of the change of the outputs on the probe that the network linearised at an earlier time "
        "does not have. It is 0 for a network that moves like its linearisation."
    )
    return Picture("lazy-error", "Lazy error", caption, figure)


def draw_regression(run: RunReader, kernels: "xarray.Dataset") -> Picture:
    """Draw the accuracy of kernel regression on the probe samples of the tasks so far."""
    names = {"leave_one_out_accuracy": "training samples, each left out", "held_out_accuracy": "validation samples"}
    lines = {title: 100 * kernels[name].values for name, title in names.items() if name in kernels}
    with styled():
        figure, axes = new_axes()
        _draw_lines(axes[0], kernels.epoch.values, lines)
        axes[0].set(ylabel="accuracy, %", ylim=(-3, 103))
        Timeline.of(run).settle(axes)
        legend(axes[0])
    caption = (
        "Accuracy of regression with the kernel of each time, fitted to the labels of the training samples of the "
        "tasks so far. The number of classes grows at each switch."
    )
    return Picture("regression", "Kernel regression", caption, figure)


def draw_progress(run: RunReader) -> Picture:
    """Draw the accuracy over all classes so far, and the accuracy on each new task."""
    names = {
        "class-incremental": "accuracy",
        "task-incremental": "task_accuracy",
        "class-incremental, by the outputs": "head_accuracy",
    }
    found = {title: run.matrix(name) for title, name in names.items() if run.has(name)}
    by_outputs, others = (found[name].values for name in ("class-incremental, by the outputs", "class-incremental"))
    if np.array_equal(by_outputs, others, equal_nan=True):
        del found["class-incremental, by the outputs"]
    with styled():
        figure, axes = new_axes(2)
        classes = run.num_seen_classes[: run.num_finished]
        _draw_lines(axes[0], classes, {name: 100 * matrix.seen_accuracy for name, matrix in found.items()})
        tasks = np.arange(run.num_finished)
        _draw_lines(axes[1], tasks, {name: 100 * matrix.new_task_accuracy for name, matrix in found.items()})
        axes[0].set(title="On all classes so far", xlabel="number of classes", ylabel="accuracy, %")
        axes[1].set(title="On the new task, just after it", xlabel="task")
        for panel, ticks in zip(axes, (classes, tasks), strict=True):
            panel.set(ylim=(-3, 103), xticks=ticks[:: -(-len(ticks) // 10)])
        legend(axes[0])
    mean = 100 * np.mean(run.matrix().seen_accuracy)
    caption = (
        "Accuracy on the held-out samples after each task: on those of all tasks so far (seen accuracy), and on those "
        f"of the new task (new-task accuracy). The mean over the tasks of the left curve is {mean:.1f} %."
    )
    return Picture("progress", "Incremental accuracy", caption, figure)


def _scale(axes: "Axes") -> None:
    """Make the vertical axis logarithmic if the drawn values, which are positive, differ by more than a few times."""
    drawn = np.concatenate([np.asarray(line.get_ydata(), np.float64) for line in axes.lines])
    if np.nanmax(drawn) > WIDE * np.nanmin(drawn):
        axes.set_yscale("log")


def _broken(kernels: "xarray.Dataset", values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Break a line wherever the next pair of kernels begins later than the last one ends; leave out zeros."""
    gaps = 1 + np.flatnonzero(np.diff(kernels.start.values) > kernels.attrs["dt"])
    values = np.where(values > 0, values, np.nan)
    return np.insert(kernels.start_epoch.values, gaps, np.nan), np.insert(values, gaps, np.nan)


def _draw_lines(axes: "Axes", x: npt.NDArray[Any], lines: Mapping[str, npt.NDArray[Any]]) -> None:
    """Draw lines with different styles. An empty name is not for the legend."""
    for (name, values), line in zip(lines.items(), LINES, strict=False):
        axes.plot(x, values, label=name or None, **line.style(len(x)))
