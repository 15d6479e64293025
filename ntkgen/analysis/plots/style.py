"""How every picture looks, and how one is made without any state of a drawing program."""

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

WIDTH, HEIGHT = 6.6, 4.0  # inches, of every picture but those that say otherwise
FORMATS = ("png", "svg")

STYLE: Any = {  # matplotlib's type of it names its settings one by one
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # which comes with matplotlib, and has every sign that is used
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
    "image.cmap": "cividis",  # its lightness grows steadily: the same picture in grey
    "svg.fonttype": "path",  # letters as shapes: no text moves where another font is at hand
    "svg.hashsalt": "ntkgen",  # equal pictures have equal bytes
}


@dataclass(frozen=True)
class Line:
    """How one of several series is drawn: told apart by lightness, dashes and marks, never by colour alone."""

    color: str
    linestyle: str
    marker: str

    def style(self, num_points: int) -> dict[str, Any]:
        """Turn into what `Axes.plot` takes, with marks where there are few points."""
        marked = {"marker": self.marker} if num_points <= 40 else {}
        return {"color": self.color, "linestyle": self.linestyle, **marked}


# Dark blue, vermilion, sky blue and grey: safe for the colour-blind, and four lightnesses.
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
    """A drawn figure, with what it shows in words: for those who do not see it, and below it."""

    kind: str
    title: str
    caption: str
    figure: "Figure" = field(compare=False)

    def __post_init__(self) -> None:
        """Settle where everything goes, once: the layout would move a little with each time that it is drawn."""
        with styled():
            for axes in self.figure.axes:
                _settle_ticks(axes)
            self.figure.draw_without_rendering()
            self.figure.set_layout_engine("none")


def _settle_ticks(axes: "Axes") -> None:
    """Number logarithmic axes so that no number covers another: decades, or some steps within one."""
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
    """Set the style, and set it back."""
    with mpl.rc_context(STYLE):
        yield


def new_axes(columns: int = 1, *, height: float = HEIGHT) -> "tuple[Figure, list[Axes]]":
    """Make a figure of some panels side by side, whose texts make room for each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def render(picture: Picture, form: str) -> bytes:
    """Write a picture as PNG or SVG; the same picture gives the same bytes."""
    made, file = {"svg": {"Date": None}}.get(form, {}), io.BytesIO()
    with styled():
        picture.figure.savefig(file, format=form, metadata={**made, "Title": picture.title})
    return file.getvalue()


def scale_for(*values: Any) -> str:
    """Choose a logarithmic axis, unless there is nothing on it that could be drawn.

    >>> scale_for([0.0, 2.0]), scale_for([0.0, -1.0], [])
    ('log', 'linear')
    """
    return "log" if any(np.any(np.asarray(each, dtype=np.float64) > 0) for each in values) else "linear"


def legend(axes: "Axes", columns: int | None = None) -> None:
    """Explain the series of a panel below all of them, where it can cover none."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = columns or (2 if len(handles) == 4 else min(len(handles), 3))
        axes.figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def plain(value: float, digits: int = 3) -> str:
    """Write a number for a tick or a caption, with a true minus sign.

    >>> plain(-2.3349), plain(1.5e-7), plain(12345.6)
    ('−2.33', '1.5e−07', '12,300')
    """
    text = f"{value:.{digits}g}"
    if "e+" in text and abs(value) < 1e6:
        text = f"{float(text):,.0f}"
    return text.replace("-", "−")
