"""Pictures of the scaled utilities of weights at the end of a run: boxes per layer, and the kernels as images."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ntkgen.analysis.plots.style import HEIGHT, WIDTH, Picture, new_axes, styled
from ntkgen.continual.plots.lines import ROW, legend_below, panels_with_legend, style_of, wrapped
from ntkgen.continual.plots.streaming import stream_title
from ntkgen.continual.streaming.summary import best_row, rows_of
from ntkgen.units import counted

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes

    from ntkgen.continual.streaming.summary import Row

Utilities = Mapping[str, npt.NDArray[np.float32]]

# A weight that is worth nothing has this scaled utility.
NEUTRAL = 0.5
# Kernels in a row of images, and rows, at most.
COLUMNS, ROWS = 8, 8
# Combinations with boxes, at most.
SHOWN = 6
# Part of the distance between two layers that their boxes take.
BOXES = 0.8


def draw_utilities(utilities: Utilities, run: "xarray.Dataset") -> list[Picture]:
    """Draw the utilities of all parameters as boxes, and those of the first convolution as images.

    Networks that have diverged are left out.

    Args:
        utilities: The scaled utilities of every parameter, (members, …); see `read_utilities`.
        run: What the run has measured.
    """
    rows, seeds = rows_of(run), run.sizes["seed"]
    finite = [np.isfinite(each.reshape(len(each), -1)).all(1) for each in utilities.values()]
    is_finite: npt.NDArray[np.bool_] = np.logical_and.reduce(finite)
    if not is_finite.any():
        return []
    pictures = [_boxes(utilities, is_finite.reshape(-1, seeds), rows, run)]
    kernels = next((values for values in utilities.values() if values.ndim == 5), None)
    if kernels is None:
        return pictures
    best = next(index for index in _by_accuracy(rows) if is_finite[index * seeds : (index + 1) * seeds].any())
    seed = int(np.flatnonzero(is_finite[best * seeds : (best + 1) * seeds])[0])
    of = f"{rows[best].name}, seed {int(run.seed[seed])}"
    return [*pictures, _images(kernels[best * seeds + seed], of, run)]


def _by_accuracy(rows: "list[Row]") -> list[int]:
    """List the combinations, the best first."""
    left, found = list(range(len(rows))), []
    while left:
        best = best_row([rows[index] for index in left])
        found.append(next(index for index in left if rows[index] is best))
        left.remove(found[-1])
    return found


def _boxes(utilities: Utilities, is_finite: npt.NDArray[np.bool_], rows: "list[Row]", run: "xarray.Dataset") -> Picture:
    finite = [index for index in _by_accuracy(rows) if is_finite[index].any()]
    chosen = sorted(finite[:SHOWN])
    names = [rows[index].name for index in chosen]
    parts = [f"{stream_title(run)}: scaled utility of the weights at the end", *_left_out(is_finite, len(chosen))]
    flat = {name: values.reshape(*is_finite.shape, -1) for name, values in utilities.items()}
    with styled():
        figure, (axes,) = panels_with_legend(1, names, "; ".join(parts))
        width = BOXES / len(chosen)
        for order, index in enumerate(chosen):
            values = [each[index][is_finite[index]].ravel() for each in flat.values()]
            at = [layer + (order - (len(chosen) - 1) / 2) * width for layer in range(len(flat))]
            _draw_boxes(axes, values, at, 0.85 * width, style_of(order, len(chosen), 0)["color"], names[order])
        axes.axhline(NEUTRAL, color="0.6", linewidth=0.8)
        axes.set_xticks(range(len(flat)), list(flat), rotation=60)
        axes.set(ylabel="scaled utility s")
        seeds = counted(run.sizes["seed"], "seed")
        legend_below(axes, f"weights of {seeds}; boxes: quartiles and median; whiskers: 5th and 95th percentile")
    caption = (
        f"Scaled utilities s of all weights at the end, {stream_title(run)}, {'; '.join(names)}. Boxes have the "
        "quartiles and the median, whiskers the 5th and 95th percentile, of all seeds. A weight of utility 0 has "
        f"s = 0.5. Steps are scaled by 1 − s.{''.join(f' Note: {part}.' for part in parts[1:])}"
    )
    return Picture("stream-utilities", f"{names[0]}: utilities", caption, figure)


def _draw_boxes(
    axes: "Axes", values: list[npt.NDArray[np.float32]], at: list[float], width: float, color: str, name: str
) -> None:
    drawn = axes.boxplot(
        values,
        positions=at,
        widths=width,
        whis=(5, 95),
        showfliers=False,
        patch_artist=True,
        medianprops={"color": color, "linewidth": 1.6},
        boxprops={"facecolor": (color, 0.35), "edgecolor": color},
        whiskerprops={"color": color},
        capprops={"color": color},
    )
    drawn["boxes"][0].set_label(name)


def _left_out(is_finite: npt.NDArray[np.bool_], shown: int) -> list[str]:
    """Say which networks are not in the picture."""
    diverged, complete = int((~is_finite).sum()), int(is_finite.any(1).sum())
    parts = [f"{diverged} of {counted(is_finite.size, 'network')} diverged and left out"] * (diverged > 0)
    return parts + [f"the {shown} combinations of {complete} with the best accuracy"] * (shown < complete)


def _images(kernels: npt.NDArray[np.float32], of: str, run: "xarray.Dataset") -> Picture:
    """Draw the kernels of one network, (outputs, inputs, height, width): a column per output channel."""
    outputs, inputs = kernels.shape[:2]
    if inputs == 1:  # rows go on with the next output channels
        own = kernels[: COLUMNS * 2, 0]
        columns = min(COLUMNS, len(own))
        places = {(index // columns, index % columns): (str(index), kernel) for index, kernel in enumerate(own)}
    else:
        columns, chosen = min(COLUMNS, outputs), kernels[:COLUMNS, :ROWS]
        places = {(i, o): (str(o), kernel) for o, row in enumerate(chosen) for i, kernel in enumerate(row)}
    rows = 1 + max(row for row, _ in places)
    reach = max(float(np.abs(kernel - NEUTRAL).max()) for _, kernel in places.values()) or 1.0
    with styled():
        side = min(HEIGHT / 2, (WIDTH - 1.2) / columns)
        title = wrapped(f"{stream_title(run)}: utilities of the first kernels of one network, {of}")
        height = 1.1 + (side + 0.2 * (inputs == 1)) * rows + ROW * title.count("\n")
        figure, axes = new_axes(columns, rows=rows, height=height)
        for panel in axes:
            panel.set_axis_off()
        for (row, column), (name, kernel) in places.items():
            panel = axes[row * columns + column]
            panel.set_axis_on()
            image = panel.imshow(kernel, vmin=NEUTRAL - reach, vmax=NEUTRAL + reach, cmap="RdBu_r")
            panel.set(xticks=[], yticks=[])
            panel.grid(visible=False)
            if row == 0 or inputs == 1:
                panel.set_title(name)
            if column == 0 and inputs > 1:
                panel.set_ylabel(str(row))
        figure.suptitle(title, x=0.01, ha="left", fontsize=9)
        figure.supxlabel("output channel", fontsize=9)
        if inputs > 1:
            figure.supylabel("input channel", fontsize=9)
        figure.colorbar(image, ax=axes, label="s", aspect=20)
    caption = (
        f"Scaled utilities s of the kernels of the first convolution at the end, {stream_title(run)}, {of}. White is "
        "s = 0.5, the utility 0."
    )
    return Picture("stream-kernel-utilities", f"{of}: utilities of kernels", caption, figure)
