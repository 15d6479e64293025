"""Pictures of the scaled utilities of weights at the end of a run: a box per layer, and the kernels as images."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ntkgen.analysis.plots.style import DARK, Picture, new_axes, styled

# A weight that is worth nothing has this scaled utility.
NEUTRAL = 0.5
# Kernels that are shown at most, of input and of output channels.
SHOWN = 8


def draw_utilities(utilities: Mapping[str, npt.NDArray[np.float32]], of: str) -> list[Picture]:
    """Draw the utilities of all parameters as boxes, and those of the first convolution as images.

    Args:
        utilities: The scaled utilities of every parameter, (members, …).
        of: What the run is, for titles.
    """
    pictures = [_boxes(utilities, of)]
    kernels = next((values for values in utilities.values() if values.ndim == 5), None)
    return pictures if kernels is None else [*pictures, _images(kernels, of)]


def _boxes(utilities: Mapping[str, npt.NDArray[np.float32]], of: str) -> Picture:
    with styled():
        figure, (axes,) = new_axes()
        line = {"color": DARK}
        axes.boxplot(
            [values.ravel() for values in utilities.values()],
            whis=(5, 95),
            showfliers=False,
            medianprops=line,
            tick_labels=list(utilities),
        )
        axes.axhline(NEUTRAL, color="0.6", linewidth=0.8)
        axes.tick_params(axis="x", rotation=60)
        axes.set(title="Scaled utility of the weights", ylabel="s")
    caption = (
        f"Scaled utilities s of all weights at the end, {of}, of all networks. Boxes have the quartiles and the "
        "median, whiskers the 5th and 95th percentile. A weight of utility 0 has s = 0.5. Steps are scaled by 1 − s."
    )
    return Picture("stream-utilities", f"{of}: utilities", caption, figure)


def _images(kernels: npt.NDArray[np.float32], of: str) -> Picture:
    own = kernels[0, :SHOWN, :SHOWN]  # of the first network
    rows, columns = own.shape[:2]
    reach = float(np.abs(own - NEUTRAL).max()) or 1.0
    with styled():
        figure, axes = new_axes(columns, rows=rows, height=0.9 + 0.8 * rows)
        for panel, kernel in zip(axes, own.reshape(-1, *own.shape[2:]), strict=True):
            image = panel.imshow(kernel, vmin=NEUTRAL - reach, vmax=NEUTRAL + reach, cmap="RdBu_r")
            panel.set(xticks=[], yticks=[])
            panel.grid(visible=False)
        for row in range(rows):
            axes[row * columns].set_ylabel(str(row))
        for column in range(columns):
            axes[column].set_title(str(column))
        figure.supxlabel("input channel")
        figure.supylabel("output channel")
        figure.colorbar(image, ax=axes, label="s", aspect=25)
    caption = (
        f"Scaled utilities s of the kernels of the first convolution at the end, {of}, of the first network. White is "
        "s = 0.5, the utility 0."
    )
    return Picture("stream-kernel-utilities", f"{of}: utilities of kernels", caption, figure)
