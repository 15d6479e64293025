"""Pictures of runs that learn permuted streams: accuracy and plasticity over the tasks, and the kernel beside them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt

from ntkgen.analysis.plots.style import LINES, Picture, legend, new_axes, styled
from ntkgen.continual.streaming.labels import labels_of

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes

OPACITY = 0.22
# The measures of a stream in a picture, with the titles of their panels.
PANELS = {"accuracy": "Accuracy", "plasticity": "Plasticity"}
# The measures of a kernel beside them.
OF_KERNELS = {"effective_rank": "Kernel: effective rank", "distance": "Kernel: distance"}


@dataclass(frozen=True, eq=False)
class Curve:
    """A measure over a stream, for several seeds.

    Attributes:
        name: What it is of, for the legend.
        at: Samples so far, (times,).
        values: The values, (times, seeds).
    """

    name: str
    at: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """Mean over the seeds."""
        return np.asarray(self.values.mean(1))

    @property
    def standard_error(self) -> npt.NDArray[np.float64]:
        """Standard error of the mean; 0 with one seed."""
        count = self.values.shape[1]
        return self.values.std(1, ddof=1) / count**0.5 if count > 1 else np.zeros(len(self.values))


def curves_of(runs: Sequence["xarray.Dataset"], measure: str, last: int | None = None) -> list[Curve]:
    """List a measure of every learner and combination, over all bins or the last ones; see `read_stream`."""
    found = []
    for run in runs:
        bins = slice(None) if last is None else slice(-last, None)
        own = run.isel(bin=bins)
        for index, name in enumerate(labels_of(run)):
            values = own[measure].isel(combination=index).transpose("bin", "seed").values
            found.append(Curve(name, np.asarray(own.samples.values), np.asarray(values, np.float64)))
    return found


def draw_streams(runs: Sequence["xarray.Dataset"], last: int | None = None) -> Picture:
    """Draw accuracy and plasticity over the samples: means over seeds, with bands of one standard error.

    Args:
        runs: What the runs have measured.
        last: Number of bins at the end that are drawn; None for all.
    """
    with styled():
        figure, axes = new_axes(2)
        for panel, (measure, title) in zip(axes, PANELS.items(), strict=True):
            _draw(panel, curves_of(runs, measure, last))
            panel.set(title=title, xlabel="samples", ylabel="mean over a task")
        legend(axes[0])
    part = "" if last is None else f" Shown are the last {last} tasks."
    return Picture("stream" if last is None else "stream-end", _title(runs), f"{_caption(runs)}{part}", figure)


def draw_kernels(run: "xarray.Dataset", kernels: Sequence["xarray.Dataset"]) -> Picture:
    """Draw effective rank and distance of the kernel beside the plasticity of a run.

    Args:
        run: What the run has measured.
        kernels: The metrics of the kernels of each seed, for the first combination; see `kernel_metrics`.
    """
    plasticity = curves_of([run], "plasticity")[0]
    with styled():
        figure, axes = new_axes(3)
        _draw(axes[0], [plasticity])
        axes[0].set(title="Plasticity", xlabel="samples", ylabel="mean over a task")
        at = np.asarray(kernels[0].iteration.values)
        for panel, (name, title) in zip(axes[1:], OF_KERNELS.items(), strict=True):
            values = np.stack([np.asarray(each[name].values, np.float64) for each in kernels], 1)
            _draw(panel, [Curve(plasticity.name, at, values)])
            panel.set(title=title, xlabel="samples")
    caption = (
        f"{_caption([run])} The kernels are those of a fixed probe; the distance is 1 − cosine, from the first kernel."
    )
    return Picture("stream-kernels", f"{_title([run])}: kernel", caption, figure)


def _draw(panel: "Axes", curves: Sequence[Curve]) -> None:
    for index, curve in enumerate(curves):
        style: dict[str, Any] = LINES[index % len(LINES)].style(len(curve.at))
        if len(curves) > len(LINES):
            style["color"] = mpl.colormaps["cividis"](0.85 * index / (len(curves) - 1))
        panel.plot(curve.at, curve.mean, label=curve.name, **style)
        if curve.values.shape[1] > 1:
            low, high = curve.mean - curve.standard_error, curve.mean + curve.standard_error
            panel.fill_between(curve.at, low, high, color=style["color"], alpha=OPACITY, linewidth=0)


def _title(runs: Sequence["xarray.Dataset"]) -> str:
    settings = runs[0].attrs["settings"]
    return f"{settings['stream']} {settings['dataset']}"


def _caption(runs: Sequence["xarray.Dataset"]) -> str:
    settings, seeds = runs[0].attrs["settings"], runs[0].sizes["seed"]
    bands = "bands are ± one standard error" if seeds > 1 else "without bands"
    return (
        f"A stream of single samples, {settings['stream']} {settings['dataset']}, learnt by {settings['model']}. "
        "Accuracy is that of each sample before its step; plasticity is the part of its loss that its own step takes "
        f"away. Lines are means over {seeds} seed{'s' * (seeds > 1)}, {bands}."
    )
