"""The picture of the forgetting that the kernel predicts, beside the true one."""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ntkgen.analysis.plots.style import DARK, LINES, WARM, Picture, legend, new_axes, styled
from ntkgen.continual.reading import RunReader

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes

FloatArray = npt.NDArray[np.float64]
# Maximum number of points of a cloud, since a picture with more is large and shows no more.
MAX_POINTS = 2000


def draw_forgetting(run: RunReader) -> Picture | None:
    """Draw predicted against true changes of outputs and losses of old tasks; None if no task has an old one.

    Raises:
        InputError: If the kernels of the run predict no changes.
        StoreError: If the run has not recorded the outputs.
    """
    found = run.predicted_forgetting()
    tasks = run.kernels_of("train").row_task.values[:: int(run.kernels.row_output.values.max()) + 1]
    predicted, true = _changes(found, tasks)
    if not len(true):
        return None
    is_old = found.task.values[None] < found.new_task.values[:, None]
    losses = [np.where(is_old, found[name].values, np.nan) for name in ("predicted_loss_increase", "loss_increase")]
    with styled():
        figure, axes = new_axes(2)
        step = -(-len(true) // MAX_POINTS)
        axes[0].plot(predicted[::step], true[::step], ".", color=DARK, markersize=3, alpha=0.5, markeredgewidth=0)
        are_few = found.sizes["new_task"] <= len(LINES)
        for new, (column, row) in enumerate(zip(*losses, strict=True)):
            if not np.isnan(row).all():
                style = {**(LINES[new] if are_few else LINES[0]).style(1), "linestyle": ""}
                axes[1].plot(column, row, label=f"task {found.new_task.values[new]}", **style)
        axes[0].set(title="Change of outputs", xlabel="predicted × scale", ylabel="true")
        axes[1].set(title="Increase of the loss", xlabel="of the predicted change × scale, nats", ylabel="true, nats")
        for panel in axes:
            _draw_equality(panel)
        if are_few:
            legend(axes[1], found.sizes["new_task"])
    cosines = ", ".join(f"{cosine:.2f}" for cosine in found.old_cosine.values if np.isfinite(cosine))
    caption = (
        "What the kernel predicts to first order for the probe samples of old tasks while a new task is learned, and "
        "what has happened. In both panels the predicted change is multiplied by the scale that fits best, one number "
        "for each new task; the increase of the loss follows from it. On the dashed line both are equal. The cosines "
        f"for the new tasks are {cosines}. The kernel is {found.attrs['kernel']}."
    )
    return Picture("forgetting", "Predicted forgetting", caption, figure)


def _changes(found: "xarray.Dataset", tasks: npt.NDArray[np.int64]) -> tuple[FloatArray, FloatArray]:
    """List the predicted changes, times the fitted scale, and the true changes of the outputs on old tasks."""
    pairs = []
    for new, task in enumerate(found.new_task.values):
        old = tasks < task
        columns = [found[name].values[new][old].ravel() for name in ("predicted_change", "true_change")]
        pairs.append((columns[0] * float(found.old_scale.values[new]), columns[1]))
    predicted, true = (np.concatenate(column) for column in zip(*pairs, strict=True))
    kept = np.isfinite(predicted) & np.isfinite(true)
    return predicted[kept], true[kept]


def _draw_equality(axes: "Axes") -> None:
    """Draw the line on which both axes have the same value, within what is drawn."""
    low = min(axes.get_xlim()[0], axes.get_ylim()[0])
    high = max(axes.get_xlim()[1], axes.get_ylim()[1])
    axes.plot([low, high], [low, high], color=WARM, linestyle="--", linewidth=1, zorder=0)
    axes.set(xlim=(low, high), ylim=(low, high))
