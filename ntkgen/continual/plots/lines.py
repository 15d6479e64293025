"""Lines over a stream: means over seeds with bands, styles that tell many lines apart, and the legend below them."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ntkgen.analysis.plots.style import HEIGHT, LINES, WIDTH, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Opacity of bands, and that of many.
OPACITY, FAINT = 0.2, 0.1
# Colours, dashes and markers of many lines. Neighbours differ in all three, and 40 lines in colour or dashes.
COLORS = (
    "#12355b", "#d55e00", "#56b4e9", "#009e73", "#cc79a7", "#7f7f7f", "#e6a700", "#000000", "#8c2d04", "#5e3c99"
)  # fmt: skip
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Points with a marker, at most.
MARKED = 40
# Inches of a letter and of a line in the legend, and of the line sample with its spaces.
LETTER, ROW, SAMPLE = 0.078, 0.185, 0.6
# Letters in a line of the legend, and of a title.
LETTERS, TITLE_LETTERS = 76, 95


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
        """Mean over the seeds; NaN from where one has diverged."""
        return np.asarray(self.values.mean(1))

    @property
    def standard_error(self) -> npt.NDArray[np.float64]:
        """Standard error of the mean; 0 with one seed."""
        count = self.values.shape[1]
        return self.values.std(1, ddof=1) / count**0.5 if count > 1 else np.zeros(len(self.values))

    @property
    def label(self) -> str:
        """The name, and how many networks have diverged if there are some."""
        count = int(np.isnan(self.values[-1]).sum()) if len(self.values) else 0
        return self.name if not count else f"{self.name} ({count} of {self.values.shape[1]} diverged)"


def style_of(index: int, count: int, points: int) -> dict[str, Any]:
    """Give the style of one of several lines: those of all figures up to five, and more colours beyond.

    >>> len({(each["color"], each["linestyle"]) for each in (style_of(i, 40, 9) for i in range(40))})
    40
    """
    if count <= len(LINES):
        return LINES[index].style(points)
    color, dashes = COLORS[index % len(COLORS)], DASHES[(index + index // len(COLORS)) % len(DASHES)]
    marker = {"marker": MARKERS[index % len(MARKERS)]} if points <= MARKED else {}
    return {"color": color, "linestyle": dashes, **marker}


def draw_curves(
    panel: "Axes",
    curves: Sequence[Curve],
    styles: Sequence[int] | None = None,
    period: int | None = None,
    count: int | None = None,
) -> None:
    """Draw means with bands of one standard error, or with bars if a curve is a single point.

    Args:
        panel: Where they are drawn.
        curves: The curves.
        styles: The number of the style of each; None for their order.
        period: Samples of a task, for ticks where tasks end; None if they have several lengths.
        count: Number of styles among which they are; None for as many as are used.
    """
    from matplotlib.ticker import FixedLocator, MaxNLocator

    count = count or (len(curves) if styles is None else max(styles, default=0) + 1)
    alpha = OPACITY if count <= len(LINES) else FAINT
    for index, curve in enumerate(curves):
        style = style_of(index if styles is None else styles[index], count, len(curve.at))
        panel.plot(curve.at, curve.mean, label=curve.label, **style)
        if curve.values.shape[1] > 1 and len(curve.at) == 1:
            panel.errorbar(
                curve.at, curve.mean, curve.standard_error, color=style["color"], capsize=3, linestyle="none"
            )
        elif curve.values.shape[1] > 1:
            low, high = curve.mean - curve.standard_error, curve.mean + curve.standard_error
            panel.fill_between(curve.at, low, high, color=style["color"], alpha=alpha, linewidth=0)
    at = sorted({int(each) for curve in curves for each in curve.at})
    ticks = task_ticks(at[0], at[-1], period) if at and period is not None else []
    panel.xaxis.set_major_locator(FixedLocator(ticks) if ticks else MaxNLocator(4, integer=True))
    panel.set(xlabel="samples")


def panels_with_legend(count: int, names: Sequence[str], title: str) -> "tuple[Figure, list[Axes]]":
    """Create panels beside each other, with a title and with room for a legend of these names below."""
    columns, lines = _layout(names)
    shown = wrapped(title)
    rows = -(-len(names) // columns) * lines
    figure, axes = new_axes(count, height=HEIGHT + ROW * (max(rows - 1, 0) + shown.count("\n") + 1))
    figure.suptitle(shown, x=0.01, ha="left", fontsize=9)
    return figure, axes


def task_ticks(first: int, last: int, period: int, most: int = 4) -> list[int]:
    """List ends of tasks between two samples, about as many as there is room for: of every, second, fifth, … task.

    >>> task_ticks(30, 90, 30), task_ticks(2500, 1_000_000, 2500), task_ticks(90, 90, 30), task_ticks(31, 31, 30)
    ([30, 60, 90], [250000, 500000, 750000, 1000000], [90], [])
    """
    factors = (digit * 10**power for power in range(19) for digit in (1, 2, 5))
    step = period * next(factor for factor in factors if last - first < most * factor * period)
    return list(range(-(-first // step) * step, last + 1, step)) or ([last] if last % period == 0 else [])


def wrapped(title: str) -> str:
    """Break a title into lines that fit the width of a figure.

    >>> [len(line) for line in wrapped("word " * 30).splitlines()]
    [94, 54]
    """
    return "\n".join(textwrap.wrap(title, TITLE_LETTERS))


def legend_below(axes: "Axes", title: str) -> None:
    """Add the legend of a panel below all panels. Long names have several lines, and none is cut off."""
    handles, names = axes.get_legend_handles_labels()
    shown = ["\n".join(textwrap.wrap(name, LETTERS)) for name in names]
    columns, _ = _layout(names)
    axes.figure.legend(handles, shown, loc="outside lower center", ncols=columns, title=title, title_fontsize=9)


def _layout(names: Sequence[str]) -> tuple[int, int]:
    """Choose the number of columns of a legend, and the largest number of lines of a name."""
    lines = max((len(textwrap.wrap(name, LETTERS)) for name in names), default=1)
    longest = max((min(len(name), LETTERS) for name in names), default=1)
    return max(1, min(3, len(names), int((WIDTH - 0.2) / (LETTER * longest + SAMPLE)))), lines
