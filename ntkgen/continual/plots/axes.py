"""The axes of the pictures of runs: epochs with the starts of the tasks as ticks, and one line per task."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt

from ntkgen.analysis.plots.style import LINES, WIDTH, legend
from ntkgen.continual.reading import RunReader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

FloatArray = npt.NDArray[np.float64]

# Widths in inches: of the label of a tick with its gap, beside a panel, and of the colour bar of many tasks.
LABEL, MARGIN, BAR = 0.65, 0.65, 0.9
# The lines of the tasks, in the order of their lightness: dark for the first task.
RAMP, RAMP_END = "cividis", 0.88


@dataclass(frozen=True, eq=False)
class Timeline:
    """The time axis of a run.

    Attributes:
        starts: The epoch at which each task begins that has begun, (tasks,).
        end: The last recorded epoch.
        num_tasks: Number of tasks of the stream.
    """

    starts: FloatArray
    end: float
    num_tasks: int

    @classmethod
    def of(cls, run: RunReader) -> "Timeline":
        """Read the ends of the tasks, where a run is always evaluated."""
        data = run.evaluations
        trained, epochs = data.trained_task.values, np.asarray(data.epoch.values, np.float64)
        ends = [float(epochs[trained == task].max()) for task in np.unique(trained)]
        return cls(np.array([0.0, *ends[:-1]]), ends[-1], run.num_tasks)

    def since(self, epochs: FloatArray, task: int) -> npt.NDArray[np.bool_]:
        """Select the times after the beginning of the training on a task, at which it has learned nothing yet."""
        return epochs > self.starts[task] if task < len(self.starts) else np.zeros(len(epochs), np.bool_)

    def settle(self, panels: "Sequence[Axes]") -> None:
        """Label the starts of the tasks, at most as many as fit, and mark the switches between tasks."""
        for axes in panels:
            width = (WIDTH - BAR * (self.num_tasks > len(LINES))) / len(panels) - MARGIN
            step = -(-len(self.starts) // max(1, int(width / LABEL)))
            labelled = range(0, len(self.starts), step)
            axes.set_xticks([self.starts[task] for task in labelled], [f"Task {task}" for task in labelled])
            axes.set(xlim=(-0.02 * self.end, 1.02 * self.end), xlabel=self.name)
            axes.grid(visible=False, axis="x")
            for start in self.starts[1:]:
                axes.axvline(start, color="0.45", linestyle=":", linewidth=0.9, zorder=0)

    @property
    def name(self) -> str:
        """Title of the axis."""
        lengths = np.unique(np.diff([*self.starts, self.end]).round(6))
        if len(lengths) > 1:
            return "training"
        unit = "epoch" if lengths[0] == 1 else "epochs"
        return f"training ({lengths[0]:g} {unit} per task)"

    def draw_tasks(self, axes: "Axes", epochs: FloatArray, values: FloatArray) -> None:
        """Draw one line per task, from its first time on.

        Args:
            axes: The panel.
            epochs: The epoch of each time, (times,).
            values: The values, (times, tasks).
        """
        for task in range(len(self.starts)):
            since = self.since(epochs, task)
            axes.plot(epochs[since], values[since, task], label=f"task {task}", **self._line(task, len(epochs)))

    def _line(self, task: int, num_points: int) -> dict[str, Any]:
        """Choose the line style of a task: one of few with a legend, or one of a ramp of lightness."""
        if self.num_tasks <= len(LINES):
            return LINES[task].style(num_points)
        color = mpl.colormaps[RAMP](RAMP_END * task / (self.num_tasks - 1))
        return {"color": color, "linewidth": 1.2}

    def key(self, panels: "Sequence[Axes]") -> None:
        """Say which line is which task: a legend for few tasks, a colour bar for many."""
        if self.num_tasks <= len(LINES):
            legend(panels[0], len(self.starts))
            return
        colours = mpl.colormaps[RAMP](np.linspace(0, RAMP_END, self.num_tasks))
        bounds = mpl.colors.Normalize(-0.5, self.num_tasks - 0.5)
        shown = mpl.cm.ScalarMappable(bounds, mpl.colors.ListedColormap(colours))
        step = -(-self.num_tasks // 10)
        panels[0].figure.colorbar(shown, ax=list(panels), label="task", ticks=range(0, self.num_tasks, step))
