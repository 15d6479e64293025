"""The picture of a run of slowly changing regression."""

from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np

from ntkgen.analysis.plots.style import LINES, Picture, legend, new_axes, styled

if TYPE_CHECKING:
    import xarray

OPACITY = 0.22


def draw_slow_regression(bins: "xarray.Dataset") -> Picture:
    """Draw the error and the dead units over the samples: means over seeds, with bands of one standard error."""
    samples, names = np.asarray(bins.samples.values), bins.algorithm.values.tolist()
    seeds = bins.sizes["seed"]
    with styled():
        figure, axes = new_axes(2)
        for panel, measure in zip(axes, ("error", "dead_units"), strict=True):
            for index, name in enumerate(names):
                values = np.asarray(bins[measure].sel(algorithm=name).transpose("bin", "seed").values, np.float64)
                style = LINES[index % len(LINES)].style(len(samples))
                if len(names) > len(LINES):
                    style["color"] = mpl.colormaps["cividis"](0.85 * index / (len(names) - 1))
                mean = values.mean(1)
                panel.plot(samples, mean, label=name, **style)
                if seeds > 1:
                    error = values.std(1, ddof=1) / seeds**0.5
                    color = style["color"]
                    panel.fill_between(samples, mean - error, mean + error, color=color, alpha=OPACITY, linewidth=0)
            panel.set(xlabel="sample")
        axes[0].set(title="Squared error", ylabel="mean over a bin", ylim=(0, None))
        axes[1].set(title="Dead hidden units", ylabel="units", ylim=(-0.1, None))
        legend(axes[0])
    bands = "bands are ± one standard error" if seeds > 1 else "without bands"
    caption = (
        "Slowly changing regression (Dohare et al. 2024): the squared error of each sample before its step, averaged "
        f"over bins, and the hidden units that are dead. Lines are means over {seeds} seed{'s' * (seeds > 1)}, {bands}."
    )
    return Picture("slow-regression", "Slowly changing regression", caption, figure)
