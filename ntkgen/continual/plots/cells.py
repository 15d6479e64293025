"""Pictures of matrices: accuracies of tasks, confusions of classes, and blocks of the kernel."""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ntkgen.analysis.plots.style import Picture, new_axes, styled
from ntkgen.continual.plots.curves import SCORES
from ntkgen.continual.reading import RunReader

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

FloatArray = npt.NDArray[np.float64]
# Numbers are written into the cells of a matrix with at most this number of rows.
MAX_LABELLED = 10
# Maximum number of ticks of an axis in a picture of one panel, and of two.
MAX_TICKS, MAX_TICKS_OF_TWO = 20, 10


def draw_matrix(run: RunReader) -> Picture:
    """Draw the accuracy matrix R, class-incremental and task-incremental."""
    shown = {name: title for name, title in SCORES.items() if run.has(name)}
    with styled():
        figure, axes = new_axes(len(shown), height=3.4)
        for panel, (name, title) in zip(axes, shown.items(), strict=True):
            image = _draw_cells(panel, 100 * run.matrix(name).values, (0, 100))
            panel.set(title=title, xlabel="accuracy on task")
        axes[0].set(ylabel="after task")
        figure.colorbar(image, ax=axes, label="accuracy, %", aspect=25)
    caption = "Accuracy on the held-out samples of each task after the training on each task."
    return Picture("matrix", "Accuracy matrix", caption, figure)


def draw_confusion(run: RunReader) -> Picture | None:
    """Draw the confusion matrix after the last finished task; None if none was recorded."""
    counts = run.confusion
    if counts is None:
        return None
    totals = counts[-1].sum(1, keepdims=True)
    kept = np.flatnonzero(totals[:, 0])
    shares = 100 * counts[-1][kept] / totals[kept]
    classes = run.evaluations.class_order.values
    with styled():
        figure, (axes,) = new_axes(height=4.6)
        image = _draw_cells(axes, shares, (0, 100), [str(each) for each in classes])
        _relabel(axes, [str(each) for each in classes[kept]])
        for task in range(1, run.num_finished):
            border = run.num_seen_classes[task - 1] - 0.5
            axes.axvline(border, color="0.6", linewidth=0.7)
            axes.axhline(border, color="0.6", linewidth=0.7)
        axes.set(xlabel="predicted class", ylabel="class")
        figure.colorbar(image, ax=axes, label="samples of the class, %")
    caption = (
        "Predicted classes of the held-out samples of each class after the last finished task, over all outputs. The "
        "classes stand in the order in which they were learned; thin lines separate the tasks."
    )
    return Picture("confusion", "Confusion matrix", caption, figure)


def draw_interference(kernels: "xarray.Dataset") -> Picture | None:
    """Draw the interference of each two tasks before and after the training; None if no blocks of two are known."""
    values = np.asarray(kernels.interference.values)
    if np.isnan(values[-1]).sum() >= values[-1].size - len(values[-1]) > 0:
        return None
    limits = (0.0, max(1.0, float(np.nanmax(values))))
    with styled():
        figure, axes = new_axes(2, height=3.4)
        for panel, time, title in zip(axes, (0, -1), ("At the beginning", "At the end"), strict=True):
            image = _draw_cells(panel, values[time], limits)
            panel.set(title=title, xlabel="task")
        axes[0].set(ylabel="task")
        figure.colorbar(image, ax=axes, label="interference", aspect=25)
    caption = (
        "Norm of the block of the kernel between the probes of two tasks, divided by the root of the product of the "
        "norms of their own blocks."
    )
    return Picture("interference", "Interference of tasks", caption, figure)


def _draw_cells(
    axes: "Axes", values: FloatArray, limits: tuple[float, float], names: list[str] | None = None
) -> "AxesImage":
    image = axes.imshow(values, vmin=limits[0], vmax=limits[1], aspect="auto")
    axes.grid(visible=False)
    most = MAX_TICKS if names else MAX_TICKS_OF_TWO
    shown = [range(0, length, -(-length // most)) for length in values.shape]
    axes.set(yticks=shown[0], xticks=shown[1])
    if names:
        axes.set_xticklabels([names[at] for at in shown[1]])
    if max(values.shape) <= MAX_LABELLED:
        for (row, col), value in np.ndenumerate(values):
            if np.isnan(value):
                continue
            is_dark = value < (limits[0] + limits[1]) / 2
            text = f"{value:.0f}" if limits[1] > 2 else f"{value:.2f}"
            axes.text(col, row, text, ha="center", va="center", fontsize=8, color="white" if is_dark else "black")
    return image


def _relabel(axes: "Axes", names: list[str]) -> None:
    """Name the rows."""
    axes.set_yticklabels([names[int(at)] for at in axes.get_yticks()])
