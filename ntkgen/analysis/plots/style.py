"""The style of all figures, and functions that create figures without matplotlib's global state."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Width and default height of a figure in inches.
WIDTH, HEIGHT = 6.6, 4.0
FORMATS = ("png", "svg")

STYLE: Any = {  # `Any`, since matplotlib's own type lists all names of settings
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # this font comes with matplotlib and has all characters of the figures
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.88",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": 200,
    "image.cmap": "cividis",  # its lightness increases monotonically, so that it also works in grey
    "svg.fonttype": "path",  # letters as shapes, so that the layout does not depend on installed fonts
    "svg.hashsalt": "ntkgen",  # the same figure gives the same bytes
}


@dataclass(frozen=True)
class Line:
    """Line style of a series. Series differ in lightness, dashes and markers, not only in colour."""

    color: str
    linestyle: str
    marker: str

    def style(self, num_points: int) -> dict[str, Any]:
        """Return the keyword arguments for `Axes.plot`, with markers if there are at most 40 points."""
        marked = {"marker": self.marker} if num_points <= 40 else {}
        return {"color": self.color, "linestyle": self.linestyle, **marked}


# Line styles in the order of the series. The colours are safe for colour-blind readers and differ in lightness.
LINES = (
    Line("#12355b", "-", "o"),
    Line("#d55e00", "--", "s"),
    Line("#56b4e9", "-.", "^"),
    Line("#7f7f7f", ":", "D"),
    Line("#000000", (0, (5, 1, 1, 1, 1, 1)), "v"),  # type: ignore[arg-type]  # a pattern of dashes
)
DARK, WARM, LIGHT, GREY, BLACK = (line.color for line in LINES)


@dataclass(frozen=True)
class Picture:
    """A figure with its title and its caption. The caption also serves as alternative text."""

    kind: str
    title: str
    caption: str
    figure: "Figure" = field(compare=False)

    def __post_init__(self) -> None:
        """Compute the layout once and fix it, since matplotlib would change it slightly with each drawing."""
        with styled():
            for axes in self.figure.axes:
                _settle_ticks(axes)
            self.figure.draw_without_rendering()
            self.figure.set_layout_engine("none")


def _settle_ticks(axes: "Axes") -> None:
    """Set the ticks of logarithmic axes so that their labels do not overlap: decades, or a few steps per decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        if axis.get_scale() != "log":
            continue
        axis.set_minor_formatter(NullFormatter())
        if high < 100 * low:
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 20 * low else (1.0, 3.0)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))


@contextmanager
def styled() -> Iterator[None]:
    """Apply the style within the context, and restore the previous style afterwards."""
    with mpl.rc_context(STYLE):
        yield


def new_axes(columns: int = 1, *, rows: int = 1, height: float = HEIGHT) -> "tuple[Figure, list[Axes]]":
    """Create a figure with panels in rows and columns, and a layout in which their texts do not overlap."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())


def render(picture: Picture, form: str) -> bytes:
    """Render a picture as PNG or SVG; the same picture gives the same bytes."""
    no_date, file = {"svg": {"Date": None}}.get(form, {}), io.BytesIO()
    with styled():
        picture.figure.savefig(file, format=form, metadata={**no_date, "Title": picture.title})
    return file.getvalue()


def scale_for(*values: Any) -> str:
    """Choose a logarithmic axis if any value is positive, otherwise a linear one.

    >>> scale_for([0.0, 2.0]), scale_for([0.0, -1.0], [])
    ('log', 'linear')
    """
    return "log" if any(np.any(np.asarray(each, dtype=np.float64) > 0) for each in values) else "linear"


def legend(axes: "Axes", columns: int | None = None) -> None:
    """Add the legend of a panel below all panels, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = columns or (2 if len(handles) == 4 else min(len(handles), 3))
        axes.figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def plain(value: float, digits: int = 3) -> str:
    """Format a number for a tick or a caption, with a true minus sign.

    >>> plain(-2.3349), plain(1.5e-7), plain(12345.6)
    ('−2.33', '1.5e−07', '12,300')
    """
    text = f"{value:.{digits}g}"
    if "e+" in text and abs(value) < 1e6:
        text = f"{float(text):,.0f}"
    return text.replace("-", "−")
