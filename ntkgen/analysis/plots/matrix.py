"""Figure of the matrix: means over blocks of all entries, in one pass over the stored triangle."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ntkgen.analysis.matrix import FloatArray, Matrix
from ntkgen.analysis.plots.style import Picture, new_axes, plain, styled
from ntkgen.errors import InputError
from ntkgen.progress import Report, counter, ignore_report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

IntArray = npt.NDArray[np.int64]

# Maximum number of pixels per side; a screen would not show more.
MAX_CELLS = 400
# Maximum number of tick labels per axis.
MAX_TICKS = 12


@dataclass(frozen=True)
class Order:
    """A permutation of rows or of samples that makes the members of each group neighbours.

    Attributes:
        place: New position of each item, (items,).
        bounds: First position of each group, followed by the end of the last group.
        names: Names of the groups.
    """

    place: IntArray
    bounds: IntArray
    names: tuple[str, ...] = ()

    @property
    def cell(self) -> int:
        """Number of items per pixel."""
        return -(-len(self.place) // MAX_CELLS)


@dataclass(frozen=True)
class Decimated:
    """Means over the square blocks of a reordered matrix; the blocks of the last row and column may be smaller."""

    means: FloatArray
    order: Order


@dataclass(frozen=True)
class Panel:
    """The content of one panel: block means, with marks between groups."""

    blocks: Decimated
    title: str
    item: str  # what a row and a column stand for: a row of the kernel or a sample
    group: str  # what a group is, for the axis labels; empty for no marks


def order_by(groups: IntArray, within: IntArray | None = None) -> Order:
    """Order items by group, then by ``within``, then by their present position.

    >>> order_by(np.array([1, 0, 1, 0])).place
    array([2, 0, 3, 1])
    """
    within = np.zeros_like(groups) if within is None else within
    place = np.empty(len(groups), np.int64)
    place[np.lexsort((within, groups))] = np.arange(len(groups))
    names, counts = np.unique(groups, return_counts=True)
    return Order(place, np.concatenate([[0], np.cumsum(counts)]), tuple(map(str, names)))


def orders_of(matrix: Matrix) -> tuple[Order, Order, bool]:
    """Return the order of the rows (by output, then by sample), that of the samples (by label), and has_labels."""
    n, m, labels = matrix.num_samples, matrix.num_outputs, _labels(matrix)
    samples = order_by(np.zeros(n, np.int64) if labels is None else labels)
    rows = order_by(np.tile(np.arange(m), n), np.repeat(samples.place, m))
    return rows, samples, labels is not None


def _labels(matrix: Matrix) -> IntArray | None:
    try:
        return matrix.labels
    except InputError:
        return None


def decimate(
    matrix: Matrix, rows: Order, samples: Order, report: Report = ignore_report
) -> tuple[Decimated, Decimated]:
    """Average the kernel over blocks of rows, and its trace kernel over blocks of samples.

    Every entry counts once: a pixel is the mean (1/|R||C|) Σ_{r∈R, c∈C} K_rc over its reordered rows R and columns C.
    The entry of the trace kernel for samples i and j is (1/m) Σ_a K_(ia)(ja). Takes one pass over the stored triangle,
    and memory for one tile and the pixels.
    """
    m, step = matrix.num_outputs, counter(report, "block means", 0, matrix.num_tiles)
    sums = [np.zeros((_cells(order),) * 2) for order in (rows, samples)]
    for of_rows, of_cols, values in matrix.tiles(step=step):
        top, left, (height, width) = of_rows.start, of_cols.start, values.shape
        traces = np.einsum("iaja->ij", values.reshape(height // m, m, width // m, m)) / m
        _add(sums[0], values, (top, left), rows)
        _add(sums[1], traces, (top // m, left // m), samples)
    return _decimated(sums[0], rows), _decimated(sums[1], samples)


def _cells(order: Order) -> int:
    return -(-len(order.place) // order.cell)


def _add(sums: FloatArray, values: FloatArray, corner: tuple[int, int], order: Order) -> None:
    """Add the entries of a block B of one triangle, and those of its transpose, to the sums of their pixels.

    With the 0/1 matrices E and F, which assign the block's rows and columns to pixels, the sum is S += Eᵀ B F.
    """
    from scipy import sparse

    height, width = values.shape
    (top, left), cells = corner, order.place // order.cell

    def membership(start: int, count: int) -> Any:  # (items, pixels)
        entries = (np.ones(count), (np.arange(count), cells[start : start + count]))
        return sparse.csr_array(entries, shape=(count, len(sums)))

    added = (membership(left, width).T @ (membership(top, height).T @ values).T).T
    sums += added
    if top != left:
        sums += added.T


def _decimated(sums: FloatArray, order: Order) -> Decimated:
    counts = np.bincount(order.place // order.cell)
    return Decimated(sums / np.outer(counts, counts), order)


def draw_matrix(matrix: Matrix, report: Report = ignore_report) -> Picture:
    """Draw the kernel by rows and, if a sample has several rows, also its trace kernel by samples."""
    rows, samples, has_labels = orders_of(matrix)
    whole, traced = decimate(matrix, rows, samples, report)
    sorting, has_outputs = "label" if has_labels else "place in the store", matrix.num_outputs > 1
    title = f"Trace ÷ m, samples by {sorting}" if has_outputs else f"All entries, samples by {sorting}"
    panels = [Panel(traced, title, "sample", "label" if has_labels else "")]
    if has_outputs:
        panels = [Panel(whole, f"All entries, by output, then {sorting}", "row", "output"), *panels]
    with styled():
        figure, axes = new_axes(len(panels), height=4.3 if has_outputs else 6.4)
        for place, panel in zip(axes, panels, strict=True):
            _draw_panel(place, panel)
    return Picture("matrix", "The matrix", _caption(matrix, panels), figure)


def _draw_panel(axes: "Axes", panel: Panel) -> None:
    """Draw block means on a signed square-root colour scale, with marks between groups."""
    from matplotlib.colors import FuncNorm

    means, order, num = panel.blocks.means, panel.blocks.order, len(panel.blocks.order.place)
    edge = len(means) * order.cell
    limit = float(np.abs(means).max()) or 1.0
    low = -limit if means.min() < 0 else 0.0
    norm = FuncNorm((signed_root, signed_square), low, limit)
    image = axes.imshow(means, norm=norm, extent=(0, edge, edge, 0), interpolation="nearest")
    axes.set(title=panel.title, xlim=(0, num), ylim=(num, 0))
    axes.grid(visible=False)
    _mark(axes, panel)
    bar = axes.figure.colorbar(image, ax=axes, location="bottom", shrink=0.9, pad=0.03)
    bar.set_label("value of K (signed square-root scale)")
    ticks = [low, 0.0, limit] if low else [0.0, limit / 4, limit]
    bar.set_ticks(ticks, labels=[plain(tick) for tick in ticks])
    bar.ax.minorticks_off()


def signed_root(values: FloatArray) -> FloatArray:
    """Compute the signed square root, sign(x) √|x|."""
    return np.asarray(np.sign(values) * np.sqrt(np.abs(values)))


def signed_square(values: FloatArray) -> FloatArray:
    """Compute x |x|, the inverse of `signed_root`."""
    return np.asarray(values * np.abs(values))


def _mark(axes: "Axes", panel: Panel) -> None:
    """Draw lines between groups, and write the names of at most `MAX_TICKS` groups at their middles."""
    order, item, group = panel.blocks.order, panel.item, panel.group
    if not group or len(order.names) < 2:
        axes.set(xlabel=item, ylabel=item)
        axes.xaxis.set_major_locator(_few_ticks())
        axes.yaxis.set_major_locator(_few_ticks())
        return
    for bound in order.bounds[1:-1]:
        for line in (axes.axhline, axes.axvline):
            line(bound, color="white", linewidth=0.5, alpha=0.8)
    stride = -(-len(order.names) // MAX_TICKS)
    middles = ((order.bounds[1:] + order.bounds[:-1]) / 2)[::stride]
    names = order.names[::stride]
    axes.set_xticks(middles, names)
    axes.set_yticks(middles, names)
    axes.tick_params(length=0)
    across = "column" if item == "row" else item
    axes.set(xlabel=f"{group} of the {across}", ylabel=f"{group} of the {item}")


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5, integer=True)


def _caption(matrix: Matrix, panels: list[Panel]) -> str:
    sizes = [panel.blocks.order.cell for panel in panels]
    pixels = " and ".join(
        f"{size} × {size} {panel.item}s" if size > 1 else f"one pair of {panel.item}s"
        for size, panel in zip(sizes, panels, strict=True)
    )
    part = ", the complete leading part of the store" if matrix.is_partial else ""
    return (
        f"The kernel K = J Jᵀ of {matrix.num_samples:,} samples × {matrix.num_outputs} outputs{part}, as stored in "
        f"{matrix.dtype}. A pixel is the mean over {pixels}{' (left, right)' * (len(panels) > 1)}; every entry counts."
    )
